"""Tokens that summaries hand on: both gradients in one, as if they were added by autograd."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

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


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = drawn(2, 45, 4, 16, seed=0), drawn(2, 45, 2, 16, seed=1)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_gradients_are_the_sum_of_both(past: bool, padded: bool) -> None:
    x, y = tokens()
    u = [drawn(4, 16, seed=2).requires_grad_(), drawn(2, 16, seed=3).requires_grad_()]
    valid = (drawn(2, 45, seed=4) < 0.5, drawn(2, 45, seed=5) < 0.5) if padded else (None, None)
    # Attention's gradient may come in any layout.
    more = drawn(2, 4, 45, 16, seed=6).transpose(1, 2), drawn(2, 45, 2, 16, seed=7)
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
    weight = drawn(*queries.shape, seed=8)
    more = drawn(*x.shape, seed=9).half()
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
