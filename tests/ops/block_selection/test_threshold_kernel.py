"""Lists by threshold against the budget and the top-k that they replace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import BlockPattern
from dilated_attention_pytorch.candidates import CandidateRule, row_ranges
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.selection.threshold import threshold_budget
from dilated_attention_pytorch.selection.top_k import choose_top_k

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch.ops.block_selection.interface import best_blocks, threshold_lists

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 8


def problem(blocks: int, local: int, sinks: int, lengths: Tensor | None = None):
    mask = AttentionMask(blocks * SIZE, blocks * SIZE, True, key_lengths=lengths)
    rows = row_ranges(mask, (SIZE, SIZE), has_diagonal=True, device=DEVICE)
    rule = CandidateRule(
        num_heads=2, num_key_blocks=blocks, block_size=SIZE, causal=True, num_local_blocks=local,
        num_sink_blocks=sinks,
    )  # fmt: skip
    return mask, rows, rule


def chosen(
    rule, rows, scores: Tensor, threshold: float | Tensor, kept: Tensor | None = None
) -> Tensor:
    """The PyTorch path: budget by threshold, then the best within it."""
    candidates = rule.build(rows).keeping(kept)
    limit = threshold[..., None] if isinstance(threshold, Tensor) else threshold
    count = threshold_budget(scores, candidates.scored, candidates.forced, limit)
    shape = torch.broadcast_shapes(scores.shape, candidates.scored.shape)
    best = choose_top_k(
        scores.expand(shape), candidates.scored.expand(shape), count, candidates.width
    )
    return best | candidates.forced


def lists(rule, rows, scores: Tensor, threshold: float | Tensor, **options: Tensor) -> Tensor:
    counts, indices = threshold_lists(scores, rule.intervals(rows), threshold, **options)
    blocks = scores.shape[-1]
    tokens = blocks * SIZE
    # Validates: ascending, inside, unused entries 0.
    pattern = BlockPattern(counts, indices, tokens, tokens, (SIZE, SIZE))
    unused = torch.arange(blocks, device=DEVICE) >= counts[..., None]
    assert (indices[unused] == 0).all()
    return pattern.to_dense()


@pytest.mark.parametrize("blocks", [1, 7, 16, 33])
@pytest.mark.parametrize("forced", [(0, 0), (1, 2)])
@pytest.mark.parametrize("threshold", [1e-30, 0.03, 0.2, 2.0])
def test_the_choice_of_budget_and_top_k(
    blocks: int, forced: tuple[int, int], threshold: float
) -> None:
    _, rows, rule = problem(blocks, *forced)
    scores = 2 * torch.randn(2, 2, blocks, blocks, generator=torch.Generator().manual_seed(blocks))
    scores = scores.to(DEVICE)
    assert torch.equal(lists(rule, rows, scores, threshold), chosen(rule, rows, scores, threshold))


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 1, 16), (1, 2, 1), (2, 2, 1), (2, 2, 16)])
def test_samples_heads_and_rows_can_have_thresholds_of_their_own(shape: tuple[int, ...]) -> None:
    _, rows, rule = problem(16, 0, 1)
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2, 2, 16, 16, generator=generator).to(DEVICE)
    threshold = torch.linspace(0.02, 0.3, shape[0] * shape[1] * shape[2]).view(shape)
    threshold = threshold.float().to(DEVICE)
    got = lists(rule, rows, scores, threshold)
    assert torch.equal(got, chosen(rule, rows, scores, threshold))
    assert not torch.equal(got, lists(rule, rows, scores, float(threshold.mean())))


@pytest.mark.parametrize("blocks", [1, 9, 16, 33])
def test_some_are_kept_in_any_case(blocks: int) -> None:
    """Those of the best by other scores, up to a number of each row; then the floor's."""
    _, rows, rule = problem(blocks, 0, 1, torch.tensor([blocks * SIZE, SIZE], device=DEVICE))
    generator = torch.Generator().manual_seed(blocks)
    # Many ties.
    others = torch.randint(0, 4, (2, 2, blocks, blocks), generator=generator).float().to(DEVICE)
    scores = 2 * torch.randn(2, 2, blocks, blocks, generator=generator).to(DEVICE)
    budget = torch.randint(0, 6, (2, 2, blocks), generator=generator).to(DEVICE)
    candidates = rule.build(rows)
    forced, _ = candidates.counts()
    found = best_blocks(others, rule.intervals(rows), forced + budget, min(8, blocks))
    scored = candidates.scored.expand(scores.shape)
    want = choose_top_k(others, scored, budget, blocks) | candidates.forced
    assert torch.equal(found & (scored | candidates.forced), want)
    for threshold in (0.2, 2.0):
        got = lists(rule, rows, scores, threshold, kept=found)
        assert torch.equal(got, chosen(rule, rows, scores, threshold, found))
        least = forced + 3
        floored = lists(rule, rows, scores, threshold, kept=found, least=least)
        missing = (least - got.sum(-1)).clamp(min=0)
        more = choose_top_k(scores, scored & ~got, missing, blocks)
        assert torch.equal(floored, got | more)


def test_ties_all_pass_or_none_does() -> None:
    _, rows, rule = problem(16, 0, 1)
    scores = torch.randint(0, 3, (1, 2, 16, 16), generator=torch.Generator().manual_seed(0))
    scores = scores.float().to(DEVICE)
    for threshold in (0.02, 0.05, 0.11):
        assert torch.equal(
            lists(rule, rows, scores, threshold), chosen(rule, rows, scores, threshold)
        )


def test_lengths_per_sample() -> None:
    _, rows, rule = problem(9, 1, 1, torch.tensor([72, 20, 0], device=DEVICE))
    scores = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(lists(rule, rows, scores, 0.1), chosen(rule, rows, scores, 0.1))


def test_what_is_no_number_ranks_lowest() -> None:
    _, rows, rule = problem(9, 0, 0)
    scores = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores[..., ::3] = float("nan")
    scores[..., 1] = -float("inf")
    assert torch.equal(lists(rule, rows, scores, 0.1), chosen(rule, rows, scores, 0.1))


def test_scores_may_have_strides() -> None:
    _, rows, rule = problem(9, 0, 1)
    scores = torch.randn(2, 9, 2, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores = scores.transpose(1, 2)
    want = lists(rule, rows, scores.contiguous(), 0.1)
    assert torch.equal(lists(rule, rows, scores, 0.1), want)
