"""Summaries by kernels against PyTorch, and tokens that they hand on: both gradients in one.

Compiled where there is a GPU, else interpreted.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import block_summaries
from dilated_attention_pytorch.scoring.summaries import past_windows

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.ops.block_selection import summaries
from dilated_attention_pytorch.ops.block_selection.interface import (
    summarise,
    summarise_and_pass,
    summarise_both,
)
from dilated_attention_pytorch.ops.block_selection.summaries import summaries_backward_op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

NAMES = ("mean", "max", "attention")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("names", [("mean", "max"), ("min", "attention", "mean", "max"), ("max",)])
@pytest.mark.parametrize("length", [1, 50, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_summaries_and_their_gradients(names: tuple[str, ...], length: int, padded: bool) -> None:
    x, u = randn(2, length, 3, 20).requires_grad_(), randn(3, 20, seed=1).requires_grad_()
    valid = randn(2, length, seed=2) < 0.3 if padded else None
    got = summarise(x, 16, names, valid, u)
    wide = [t.detach().double().requires_grad_() for t in (x, u)]
    want = block_summaries(wide[0], 16, pooling=names, valid=valid, pool_query=wide[1])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    weight = randn(*want.shape, seed=3)
    inputs = [x, u] if "attention" in names else [x]
    found = torch.autograd.grad((got * weight).sum(), inputs)
    wanted = torch.autograd.grad((want * weight).sum(), wide[: len(inputs)])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_summaries_take_strides_and_leave_padding_alone() -> None:
    x = randn(2, 3, 40, 8).transpose(1, 2)
    valid = torch.arange(40, device=DEVICE)[None] < 20
    dirty = torch.where(valid[..., None, None], x, float("nan")).transpose(1, 2).contiguous()
    names = ("mean", "max", "min")
    want = block_summaries(x, 16, pooling=names, valid=valid)
    got = summarise(dirty.transpose(1, 2), 16, names, valid)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [(64, 32), (50, 70)])
@pytest.mark.parametrize("padded", [False, True])
def test_two_tensors_are_summarised_as_each_alone(lengths: tuple[int, int], padded: bool) -> None:
    names = ("max", "attention", "mean", "min")
    x, y = randn(2, lengths[0], 3, 20), randn(2, lengths[1], 2, 20, seed=1).transpose(0, 1)
    y = y.contiguous().transpose(0, 1)
    valid = [randn(2, n, seed=4) < 0.3 if padded else None for n in lengths]
    pools = randn(3, 20, seed=2), randn(2, 20, seed=3)
    with torch.no_grad():
        both = summarise_both(x, y, 16, names, (valid[0], valid[1]), pools)
        for got, t, v, u in zip(both, (x, y), valid, pools, strict=True):
            want = block_summaries(t, 16, pooling=names, valid=v, pool_query=u)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def window_starts(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Documents that begin at blocks: their token ids, and each block's first block."""
    blocks = -(-length // size)
    first = torch.tensor([[0, 0, 2, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 6]])[:, :blocks].to(DEVICE)
    return first.repeat_interleave(size, 1)[:, :length], first.int()


# Where windows begin and end is the same for all poolings: every length with all of them at once.
@pytest.mark.parametrize(("names", "length", "size"), [
    *((("min", "attention", "mean", "max"), length, size)
      for length, size in ((1, 16), (64, 16), (50, 16), (66, 12), (37, 64))),
    (("mean", "max"), 50, 16),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["plain", "padded", "documents"])
def test_windows_of_the_past_and_their_gradients(
    names: tuple[str, ...], length: int, size: int, kind: str
) -> None:
    x, u = randn(2, length, 3, 20).requires_grad_(), randn(3, 20, seed=1).requires_grad_()
    valid = randn(2, length, seed=2) < 0.3 if kind != "plain" else None
    ids = starts = None
    if kind == "documents":
        ids, starts = window_starts(length, size)
    wide = [t.detach().double().requires_grad_() for t in (x, u)]
    moved, kept = past_windows(wide[0], size, valid, ids)
    want = block_summaries(moved, size, pooling=names, valid=kept, pool_query=wide[1])
    got = summarise(x, size, names, valid, u, past=True, starts=starts)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    weight = randn(*want.shape, seed=3)
    inputs = [x, u] if "attention" in names else [x]
    found = torch.autograd.grad((got * weight).sum(), inputs)
    wanted = torch.autograd.grad((want * weight).sum(), wide[: len(inputs)])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    y = randn(2, 70, 2, 20, seed=4)
    both_valid = (valid, None if valid is None else randn(2, 70, seed=5) < 0.3)
    with torch.no_grad():
        first, second = summarise_both(
            x, y, size, names, both_valid, (u, u[:2]), past=True, starts=starts
        )
        torch.testing.assert_close(first, got)
        torch.testing.assert_close(second, summarise(y, size, names, both_valid[1], u[:2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_summaries_of_half_precision_are_not_rounded(dtype: torch.dtype) -> None:
    x = randn(1, 64, 2, 16).to(dtype).requires_grad_()
    got = summarise(x, 32, ("mean", "max"))
    torch.testing.assert_close(got, block_summaries(x.float(), 32), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(got.sum(), x)
    wide = x.detach().float().requires_grad_()
    (want,) = torch.autograd.grad(block_summaries(wide, 32).sum(), wide)
    torch.testing.assert_close(grad, want.to(dtype), rtol=0.01, atol=0.01)


def test_the_pool_query_learns_from_tokens_that_take_no_gradient() -> None:
    x, u = randn(1, 40, 2, 8), randn(2, 8, seed=1).requires_grad_()
    names = ("max", "attention")
    found, wanted = (
        torch.autograd.grad(f(x, 16, pooling=names, pool_query=u).square().sum(), u)[0]
        for f in (summarise, block_summaries)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_first_of_equal_extremes_takes_the_gradient() -> None:
    x = torch.zeros(1, 16, 1, 4, device=DEVICE, requires_grad=True)
    summarise(x, 16, ("max", "min")).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0].eq(2).all()
    assert x.grad[0, 1:].eq(0).all()


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = randn(2, 45, 4, 16, seed=0), randn(2, 45, 2, 16, seed=1)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_gradients_are_the_sum_of_both(past: bool, padded: bool) -> None:
    x, y = tokens()
    u = [randn(4, 16, seed=2).requires_grad_(), randn(2, 16, seed=3).requires_grad_()]
    valid = (randn(2, 45, seed=4) < 0.5, randn(2, 45, seed=5) < 0.5) if padded else (None, None)
    # Attention's gradient may come in any layout.
    more = randn(2, 4, 45, 16, seed=6).transpose(1, 2), randn(2, 45, 2, 16, seed=7)
    found, wanted = [], []
    for passing in (True, False):
        a, b = x, y
        if passing:
            queries, keys, a, b = summarise_and_pass(
                x, y, 16, NAMES, valid, (u[0], u[1]), past=past
            )
        else:
            queries, keys = summarise_both(x, y, 16, NAMES, valid, (u[0], u[1]), past=past)
        loss = queries.square().sum() + keys.pow(3).sum() + (a * more[0]).sum()
        grads = torch.autograd.grad(loss + (b * more[1]).sum(), [x, y, *u])
        (found if passing else wanted).extend([queries, keys, *grads])
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_either_gradient_may_be_missing() -> None:
    x, y = tokens()
    queries, _, passed, _ = summarise_and_pass(x, y, 16, NAMES[:2], (None, None), None)
    (alone,) = torch.autograd.grad(passed.sum(), x, retain_graph=True)
    assert alone.eq(1).all()
    (got,) = torch.autograd.grad(queries.square().sum(), x)
    (want,) = torch.autograd.grad(summarise(x, 16, NAMES[:2]).square().sum(), x)
    torch.testing.assert_close(got, want)


def test_tokens_without_gradient_are_handed_on_as_they_came() -> None:
    x, y = tokens()
    with torch.no_grad():
        *_, a, b = summarise_and_pass(x, y, 16, NAMES[:2], (None, None), None)
    assert a is x
    assert b is y
    *_, a, b = summarise_and_pass(x.detach(), y, 16, NAMES[:2], (None, None), None)
    assert not a.requires_grad
    assert b.requires_grad


def test_half_precision_rounds_once() -> None:
    x, y = tokens(torch.float16)
    queries, _, passed, _ = summarise_and_pass(x, y, 16, ("mean",), (None, None), None)
    weight = randn(*queries.shape, seed=8)
    more = randn(*x.shape, seed=9).half()
    (got,) = torch.autograd.grad((queries * weight).sum() + (passed * more).sum(), x)
    wide = x.detach().float().requires_grad_()
    exact = (summarise(wide, 16, ("mean",)) * weight).sum() + (wide * more.float()).sum()
    (want,) = torch.autograd.grad(exact, wide)
    torch.testing.assert_close(got, want.half(), rtol=0, atol=0)


def test_the_layers_gradients_do_not_depend_on_whether_tokens_are_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = []

    def watched(*args: Any) -> Any:
        shared.append(args[-1] is not None)
        return summaries_backward_op(*args)

    monkeypatch.setattr(summaries, "summaries_backward_op", watched)
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5, hard_sparsity=True)
    layer = BlockSparseAdaptive(None, None, 4, 16, config, num_kv_heads=2, backend="triton")
    layer.to(DEVICE)
    # One sample of three blocks: what the kernel adds up is compared above.
    x, y = (t.detach()[:1, :40].requires_grad_() for t in tokens())
    found = []
    # Copies to choose by take the selector's gradient by themselves.
    for given in ({}, {"selector_query": x.clone(), "selector_key": y.clone()}):
        # Each pass of a layer moves its budgets.
        out = deepcopy(layer)(x, y, y.detach(), is_causal=True, **given)
        found.append(torch.autograd.grad(out.square().sum(), [x, y]))
    # Attention's gradient reaches the kernel where both read the same tokens, and there alone.
    assert shared == [True, True, False, False]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
