"""Budgets against loops: water level, rounding, complexity."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from brute_force import running_round, water_level
from dilated_attention_pytorch import get_adaptive_sparsity
from dilated_attention_pytorch.candidates import RowRange, row_ranges
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.selection.budget import (
    content_complexity,
    round_budget,
    share_by_content,
    water_level_budget,
)

CPU = torch.device("cpu")


def ranges(blocks: int, *, causal: bool, cuts: list[int] | None = None) -> RowRange:
    """Visible ranges of a sequence in blocks of one token; ``cuts`` separate documents."""
    ids = None
    if cuts is not None:
        numbers = [d for d, (a, b) in enumerate(pairwise(cuts)) for _ in range(b - a)]
        ids = torch.tensor([numbers], dtype=torch.int32)
    mask = AttentionMask(blocks, blocks, causal, 0, None, ids)
    return row_ranges(mask, (1, 1), has_diagonal=True, device=CPU)


@pytest.mark.parametrize(
    ("seq_len", "expected"),
    [(1, 0.8), (1023, 0.8), (1024, 0.9), (4095, 0.9), (4096, 0.95), (10**6, 0.95)],
)
def test_base_sparsity_by_length(seq_len: int, expected: float) -> None:
    assert get_adaptive_sparsity(seq_len) == expected


def test_base_sparsity_of_no_tokens() -> None:
    with pytest.raises(ValueError, match="seq_len"):
        get_adaptive_sparsity(0)


@given(st.integers(1, 12), st.booleans(), st.floats(0, 1), st.integers(0, 2**20))
def test_water_level_equals_bisection(blocks: int, causal: bool, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = ranges(blocks, causal=causal)
    allowed = rows.num_allowed[0, 0]
    forced = (torch.rand(blocks, generator=generator) * (allowed + 1)).floor().long()
    limit = (
        forced + (torch.rand(blocks, generator=generator) * (allowed - forced + 1)).floor().long()
    )
    keep = torch.full((1, 1, blocks), share)
    got = water_level_budget(keep, forced[None, None], limit[None, None], rows, blocks)
    level = water_level(share, forced.tolist(), limit.tolist(), allowed.tolist())
    expected = torch.minimum(torch.maximum(torch.tensor(level), forced), limit)
    torch.testing.assert_close(got[0, 0], expected.float(), atol=1e-3, rtol=1e-4)


@given(st.integers(1, 12), st.booleans(), st.floats(0.05, 1), st.integers(0, 2**20))
def test_every_row_gets_the_level_of_its_own_share(
    blocks: int, causal: bool, share: float, seed: int
) -> None:
    rows = ranges(blocks, causal=causal)
    allowed = rows.num_allowed.expand(1, 2, -1)
    forced = allowed.clamp(max=1)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(1, 2, blocks, generator=generator) * share
    together = water_level_budget(keep, forced, allowed, rows, blocks)
    for h in range(2):
        for i in range(blocks):
            one = keep[:, h : h + 1, i : i + 1].expand(1, 1, blocks)
            alone = water_level_budget(one, forced[:, :1], allowed[:, :1], rows, blocks)
            torch.testing.assert_close(together[0, h, i], alone[0, 0, i])


def test_water_level_meets_the_mean_exactly() -> None:
    rows = ranges(64, causal=True)
    allowed = rows.num_allowed.long()
    keep = torch.full((1, 1, 64), 0.1)
    exact = water_level_budget(keep, torch.ones_like(allowed), allowed, rows, 64)
    assert exact.sum().item() == pytest.approx(0.1 * allowed.sum().item(), rel=1e-5)
    assert round_budget(exact, rows).sum().item() == round(0.1 * allowed.sum().item())


def test_documents_have_levels_of_their_own() -> None:
    cuts = [0, 9, 10, 24]
    rows = ranges(24, causal=True, cuts=cuts)
    allowed = rows.num_allowed.long()
    keep = torch.rand(1, 3, 24, generator=torch.Generator().manual_seed(0))
    exact = water_level_budget(keep, allowed.clamp(max=1), allowed, rows, 24)
    rounded = round_budget(exact, rows)
    for start, end in pairwise(cuts):
        alone = ranges(end - start, causal=True)
        count = alone.num_allowed.long()
        mine = water_level_budget(keep[..., start:end], count.clamp(max=1), count, alone, 24)
        torch.testing.assert_close(exact[..., start:end], mine)
        assert torch.equal(rounded[..., start:end], round_budget(mine, alone))


def test_water_level_is_differentiable_in_the_share() -> None:
    rows = ranges(16, causal=True)
    allowed = rows.num_allowed.long()
    keep = torch.full((1, 1, 16), 0.3, requires_grad=True)

    def spent(share: Tensor) -> Tensor:
        return water_level_budget(share, allowed.clamp(max=1), allowed, rows, 16).sum()

    (slope,) = torch.autograd.grad(spent(keep), keep)
    step = 1e-3
    with torch.no_grad():
        measured = (spent(keep + step) - spent(keep - step)) / (2 * step)
    assert slope.sum().item() == pytest.approx(measured.item(), rel=1e-2)
    # All rows at one share: a little more of it is spent in full.
    assert slope.sum().item() == pytest.approx(float(allowed.sum()), rel=1e-3)


@given(st.lists(st.integers(0, 2**12), max_size=40))
def test_rounding_equals_running_sums(units: list[int]) -> None:
    shares = [unit / 2**10 for unit in units]
    rows = ranges(len(shares), causal=True)
    got = round_budget(torch.tensor(shares).view(1, 1, -1), rows)
    assert got.dtype == torch.int32
    assert got.flatten().tolist() == running_round(shares)
    for share, count in zip(shares, got.flatten().tolist(), strict=True):
        assert math.floor(share) <= count <= math.ceil(share)


def test_rounding_depends_on_no_later_row() -> None:
    budget = torch.rand(1, 2, 50, generator=torch.Generator().manual_seed(0)) * 5
    changed = budget.clone()
    changed[..., 30:] = 0.3
    rows = ranges(50, causal=True)
    assert torch.equal(round_budget(budget, rows)[..., :30], round_budget(changed, rows)[..., :30])


def expected_complexity(unit: Tensor, low: int, end: int, own: int | None) -> float:
    """1 - mean cosine, over pairs with the own block, or over all pairs."""
    visible = range(low, end)
    if own is None:
        pairs = [(a, b) for a in visible for b in visible if a != b]
    else:
        pairs = [(own, j) for j in visible if j != own] if own in visible else []
        if own not in visible and len(visible) > 0:
            return 1.0
    if not pairs:
        return 1.0
    mean = sum(float(unit[a] @ unit[b]) for a, b in pairs) / len(pairs)
    return min(max(1 - mean, 0.0), 1.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cuts", [None, [0, 5, 6, 20]])
@pytest.mark.parametrize("past_only", [False, True])
def test_complexity_equals_the_mean_over_pairs(
    causal: bool, cuts: list[int] | None, past_only: bool
) -> None:
    torch.manual_seed(0)
    means = torch.randn(1, 20, 2, 6) + 1.0
    rows = ranges(20, causal=causal, cuts=cuts)
    got = content_complexity(means, rows, past_only=past_only)
    unit = F.normalize(means, dim=-1)
    assert got.shape == (1, 2, 20)
    for h in range(2):
        for i in range(20):
            low, end = int(rows.low.expand(1, 1, 20)[0, 0, i]), int(rows.end[0, 0, i])
            own = i - 1 if past_only else i
            end = min(end, i) if past_only else end
            expected = expected_complexity(unit[0, :, h], low, end, own)
            assert got[0, h, i].item() == pytest.approx(expected, abs=1e-5), (h, i)


def test_complexity_without_a_diagonal_is_the_mean_over_all_pairs() -> None:
    torch.manual_seed(0)
    means = torch.randn(1, 7, 1, 6) + 0.5
    mask = AttentionMask(3, 7, False, 4)
    rows = row_ranges(mask, (1, 1), has_diagonal=False, device=CPU)
    got = content_complexity(means, rows)
    expected = expected_complexity(F.normalize(means, dim=-1)[0, :, 0], 0, 7, None)
    torch.testing.assert_close(got, torch.full((1, 1, 3), expected), atol=1e-5, rtol=0)


def test_shares_by_content_are_the_base_share_at_other_odds() -> None:
    keep = torch.tensor([0.05, 0.1, 0.5, 0.98, 1.0], dtype=torch.float64)
    factor = torch.tensor([1e-3, 0.5, 1.0, 2.0], dtype=torch.float64).requires_grad_()
    share = share_by_content(keep[:, None], factor)
    # What the base share is multiplied with, and what brings the sum back to 1.
    odds = keep[:, None] * factor
    torch.testing.assert_close(share, odds / (1 - keep[:, None] + odds))
    torch.testing.assert_close(share[:, 2], keep)
    # All is kept of whatever there is, and close to that nothing jumps.
    assert torch.equal(share[-1], torch.ones(4, dtype=torch.float64))
    assert (share[-2, 1:] > 0.96).all()
    (slope,) = torch.autograd.grad(share.sum(), factor)
    torch.testing.assert_close(slope, (share * (1 - share)).sum(0) / factor)


def test_complexity_is_the_batch_samples_own_and_without_gradient() -> None:
    means = torch.randn(3, 9, 2, 4, requires_grad=True)
    rows = ranges(9, causal=False)
    got = content_complexity(means, rows)
    assert not got.requires_grad
    for b in range(3):
        assert torch.equal(got[b], content_complexity(means[b : b + 1], rows)[0])


def test_repetition_and_unrelated_content_are_the_ends() -> None:
    rows = ranges(64, causal=False)
    repeated = torch.randn(1, 1, 1, 64).expand(1, 64, 1, 64)
    assert content_complexity(repeated, rows).abs().max() < 1e-5
    unrelated = content_complexity(torch.randn(1, 64, 1, 64), rows)
    assert unrelated.mean().item() == pytest.approx(1, abs=0.05)
