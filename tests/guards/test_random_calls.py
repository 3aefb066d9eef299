"""Some hundred random calls against the oracle; ``guards.random_calls`` runs any number."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from guards.random_calls import parse, run_seeds

pytestmark = [
    # NumPy says so where numbers are not finite, as many here are meant to be.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Said where fresh memory is filled with NaN: what a GPU cannot repeat bit for bit.
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]
ON_GPU = torch.cuda.is_available()


def mismatches(*arguments: str) -> list[str]:
    report = run_seeds(parse(list(arguments)))
    assert report["calls"] >= int(arguments[1])
    return [f"--only {x['seed']}: {x['wrong']} {x['about']}" for x in report["mismatches"]]


@pytest.mark.parametrize("first", range(0, 50_000, 10_000))
def test_every_backend_equals_the_oracle(first):
    assert not mismatches("--calls", "140", "--seed", str(first))


@pytest.mark.skipif(ON_GPU, reason="on a GPU the kernels run there")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_kernels_equal_the_oracle():
    assert not mismatches("--calls", "12", "--seed", "0", "--backend", "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_compiled_kernels_equal_the_oracle():
    assert not mismatches("--calls", "600", "--seed", "0", "--device", "cuda")
