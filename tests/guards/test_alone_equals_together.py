"""Random cases of a sample alone and beside others; the module beside this one draws them."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable

import pytest
import torch

from guards.alone_equals_together import CHECKS, KERNEL_CHECKS, MODEL_CHECKS

Check = Callable[[random.Random], str]


@pytest.mark.parametrize("first", [0, 1000])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@torch.no_grad()
def test_a_sample_is_the_same(check: Check, first: int) -> None:
    for seed in range(first, first + 20):
        print(f"seed {seed}: {check(random.Random(seed))}")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra [hf]")
@pytest.mark.parametrize("check", MODEL_CHECKS, ids=lambda check: check.__name__)
@torch.no_grad()
def test_a_sample_is_the_same_in_a_model(check: Check) -> None:
    for seed in range(5):
        print(f"seed {seed}: {check(random.Random(seed))}")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
@torch.no_grad()
def test_a_sample_is_the_same_by_kernels(check: Check) -> None:
    for seed in range(4):
        print(f"seed {seed}: {check(random.Random(seed))}")
