"""Budgets by kernels against the formulas.

Compiled where there is a GPU, else interpreted.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import CandidateRule, RowRange, count_forced, row_ranges
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.selection.budget import (
    FRACTION_BITS,
    content_complexity,
    documents_reach,
    round_budget,
    running_budget,
    share_by_content,
    water_level_budget,
)

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch.ops.block_selection import budgets
from dilated_attention_pytorch.ops.block_selection.budgets import (
    round_op,
    running_budget_op,
)
from dilated_attention_pytorch.ops.block_selection.interface import (
    find_candidates,
    row_budget,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (1, 2)])
@pytest.mark.parametrize("kind", ["plain", "lengths", "documents"])
@pytest.mark.parametrize("even", [None, 0.4])
def test_budgets_equal_the_formulas(
    causal: bool, heads: int, kv_heads: int, kind: str, even: float | None
) -> None:
    blocks, lengths, ids = 40, None, None
    if kind == "lengths":
        lengths = torch.tensor([40, 23], device=DEVICE)
    if kind == "documents":
        ids = torch.tensor([[0] * 25 + [1] * 15, [0] * 3 + [1] * 30 + [-1] * 7], device=DEVICE)
    mask = AttentionMask(blocks, blocks, causal, 0, lengths, None if ids is None else ids.int())
    rows = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
    rule = CandidateRule(
        num_heads=heads, num_key_blocks=blocks, block_size=1, causal=causal, num_sink_blocks=1
    )
    spans = rule.intervals(rows)
    forced, limit = count_forced(spans)
    # Alike in parts, so that the complexity varies.
    means = randn(2, kv_heads, blocks, 12) + 2 * randn(2, kv_heads, 1, 12, seed=1)
    gain = torch.linspace(0.7, 2.0, heads, device=DEVICE).requires_grad_()
    offset = torch.linspace(0.1, 0.6, heads, device=DEVICE).requires_grad_()
    base = torch.tensor(0.7, device=DEVICE)
    rounded, exact = row_budget(
        rule, rows, spans, forced, limit, base, batch=2, means=means, gain=gain, offset=offset,
        even=None if even is None else torch.tensor(even, device=DEVICE),
    )  # fmt: skip
    complexity = content_complexity(means.transpose(1, 2), rows)
    if heads == 1:
        complexity = complexity.mean(1, keepdim=True)
    elif heads > kv_heads:
        complexity = complexity.repeat_interleave(heads // kv_heads, 1)
    factor = (offset[:, None] + gain[:, None] * complexity).clamp(1e-3, 2)
    keep = share_by_content(1 - base, factor)
    want = water_level_budget(keep, forced, limit, rows, blocks)
    torch.testing.assert_close(exact, want, rtol=1e-4, atol=1e-4)
    part = exact if even is None else forced + torch.tensor(even, device=DEVICE) * (exact - forced)
    assert torch.equal(rounded, round_budget(part, rows))
    weight = randn(*want.shape, seed=2)
    found = torch.autograd.grad((exact * weight).sum(), (gain, offset))
    wanted = torch.autograd.grad((want * weight).sum(), (gain, offset))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@functools.cache
def causal_rows(heads: int, kind: str) -> tuple[RowRange, Tensor, Tensor, Tensor]:
    """Rows over 40 blocks, their intervals, and how many blocks are forced and allowed."""
    blocks, lengths, ids, queries = 40, None, None, 40
    if kind == "lengths":
        lengths = torch.tensor([40, 23], device=DEVICE)
    if kind == "documents":
        ids = torch.tensor([[0] * 25 + [1] * 15, [0] * 3 + [1] * 30 + [-1] * 7], device=DEVICE)
    if kind == "offset":
        queries = 33
    mask = AttentionMask(
        queries, blocks, True, blocks - queries, lengths, None if ids is None else ids.int()
    )
    rows = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
    lattice = {"segment_lengths": (8, 40), "dilation_rates": (1, 4)} if kind == "segments" else {}
    rule = CandidateRule(
        num_heads=heads, num_key_blocks=blocks, block_size=1, causal=True, num_sink_blocks=1,
        num_local_blocks=1, **lattice,
    )  # fmt: skip
    spans = rule.intervals(rows)
    _, forced, limit = find_candidates(rule, rows, spans)
    return rows, spans, forced, limit


@pytest.mark.parametrize(
    ("content", "even", "reach"),
    [
        (True, None, None),
        (True, 0.3, None),
        (True, 0.3, 17.5),
        (True, 0.3, 0.0),
        (False, None, None),
    ],
)
@pytest.mark.parametrize(
    ("kind", "heads", "kv_heads"),
    [
        *(("plain", *heads) for heads in ((4, 2), (2, 2), (1, 2))),
        *((kind, 4, 2) for kind in ("lengths", "documents", "segments", "offset")),
        ("segments", 1, 2),
    ],
)
def test_running_budgets_equal_the_formulas(
    heads: int, kv_heads: int, kind: str, content: bool, even: float | None, reach: float | None
) -> None:
    """In every bit, from the complexity that the kernel found."""
    rows, spans, forced, limit = causal_rows(heads, kind)
    queries, blocks = spans.shape[-1], 40
    means = randn(2, kv_heads, blocks, 12) + 2 * randn(2, kv_heads, 1, 12, seed=1)
    gain = torch.linspace(0.7, 2.0, heads, device=DEVICE).requires_grad_()
    offset = torch.linspace(0.1, 0.6, heads, device=DEVICE).requires_grad_()
    base = torch.tensor(0.85, device=DEVICE)
    part, far = (None if x is None else torch.tensor(x, device=DEVICE) for x in (even, reach))
    if reach == 0:
        far = documents_reach(rows)
    exact, _, complexity, whole = running_budget_op(
        means if content else None, gain if content else None, offset if content else None, base,
        spans, rows.diagonal_first[:, 0].contiguous(), rows.document[:, 0].contiguous(),
        forced, limit, part, far, 2, heads, True, FRACTION_BITS,
    )  # fmt: skip
    keep = (1 - base).expand(2, heads, queries)
    if content:
        expected = content_complexity(means.transpose(1, 2), rows, past_only=True)
        if heads == 1:
            expected = expected.mean(1, keepdim=True)
        elif heads > kv_heads:
            expected = expected.repeat_interleave(heads // kv_heads, 1)
        torch.testing.assert_close(complexity, expected, rtol=1e-5, atol=1e-5)
        factor = (offset[:, None] + gain[:, None] * complexity.detach()).clamp(1e-3, 2)
        keep = share_by_content(keep, factor)
    want, want_whole = running_budget(keep, forced, limit, rows, part, far)
    assert torch.equal(exact, want)
    assert torch.equal(whole, want_whole)
    if content:
        weight = randn(*want.shape, seed=2)
        found = torch.autograd.grad((exact * weight).sum(), (gain, offset))
        wanted = torch.autograd.grad((want * weight).sum(), (gain, offset))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 33, 70])
def test_running_budgets_over_several_chunks_and_at_bounds(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that earn nothing, exactly a bound, or more than their candidates; many documents."""
    monkeypatch.setattr(budgets, "MAX_CHUNK", 32)
    cut = torch.arange(rows) // 7 * (torch.arange(rows) % 50 < 30)
    ids = cut.cummax(0).values[None].int().to(DEVICE)
    for documents in (None, ids):
        mask = AttentionMask(rows, rows, True, 0, None, documents)
        ranges = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
        rule = CandidateRule(num_heads=3, num_key_blocks=rows, block_size=1, causal=True)
        spans = rule.intervals(ranges)
        _, forced, limit = find_candidates(rule, ranges, spans)
        for share in (0.0, 0.5, 1.0, 0.037):
            # A gain of 0: every row has the same share, many exactly at a bound.
            gain = torch.zeros(3, device=DEVICE).requires_grad_()
            offset = torch.tensor([share, 1.0, 1.7], device=DEVICE).requires_grad_()
            base = torch.tensor(0.5, device=DEVICE)
            means = randn(1, 3, rows, 8)
            exact, _, _, whole = running_budget_op(
                means, gain, offset, base, spans, ranges.diagonal_first[:, 0].contiguous(),
                ranges.document[:, 0].contiguous(), forced, limit, None, None, 1, 3, True,
                FRACTION_BITS,
            )  # fmt: skip
            factor = offset[:, None] + gain[:, None] * torch.ones(1, 3, rows, device=DEVICE)
            keep = share_by_content(1 - base, factor.clamp(1e-3, 2))
            want, want_whole = running_budget(keep, forced, limit, ranges)
            assert torch.equal(exact, want)
            assert torch.equal(whole, want_whole)
            found, wanted = (torch.autograd.grad(x.sum(), offset)[0] for x in (exact, want))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_a_budget_without_content() -> None:
    mask = AttentionMask(30, 30, True)
    rows = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
    rule = CandidateRule(num_heads=2, num_key_blocks=30, block_size=1, causal=True)
    spans = rule.intervals(rows)
    forced, limit = count_forced(spans)
    base = torch.tensor(0.8, device=DEVICE)
    rounded, exact = row_budget(rule, rows, spans, forced, limit, base, batch=3)
    keep = torch.full((3, 2, 30), 0.2, device=DEVICE)
    want = water_level_budget(keep, forced, limit, rows, 30)
    torch.testing.assert_close(exact, want)
    assert torch.equal(rounded, round_budget(exact, rows))


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (70, 1), (2049, 1), (70, 3)])
def test_rounding(rows: int, heads: int) -> None:
    exact = torch.rand(2, heads, rows, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 9
    exact[0, 0, ::3] = exact[0, 0, ::3].round() + 0.5
    mask = AttentionMask(rows, rows)
    ranges = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
    assert torch.equal(round_op(exact, FRACTION_BITS), round_budget(exact, ranges))
