"""Some hundred random calls against the oracle; ``guards.random_calls`` runs any number."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch.ops.block_sparse_attention.interface import BACKENDS
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


def last_tile_left_out(args):
    pattern = args.pattern
    full = pattern.kv_num_blocks == pattern.kv_indices.shape[3]
    counts = (pattern.kv_num_blocks - full.int()).clamp(min=0)
    return replace(args, pattern=replace(pattern, kv_num_blocks=counts, check_values=False))


def scale_slightly_off(args):
    return replace(args, scale=args.scale * (1 + 1e-5))


def one_later_key_seen(args):
    offset = args.mask.query_offset
    return replace(args, mask=replace(args.mask, query_offset=offset + 1))


@pytest.mark.parametrize("spoil", [last_tile_left_out, scale_slightly_off, one_later_key_seen])
def test_what_is_wrong_is_noticed(monkeypatch, spoil):
    gather = BACKENDS["gather"]
    monkeypatch.setitem(BACKENDS, "gather", lambda args: gather(spoil(args)))
    arguments = ("--calls", "40", "--kind", "attention", "--backend", "gather")
    assert len(mismatches(*arguments)) >= 3


@pytest.mark.skipif(ON_GPU, reason="on a GPU the kernels run there")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_kernels_equal_the_oracle():
    assert not mismatches("--calls", "12", "--seed", "0", "--backend", "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_compiled_kernels_equal_the_oracle():
    assert not mismatches("--calls", "600", "--seed", "0", "--device", "cuda")
