"""The lists of blocks that kernels write against PyTorch: choice, lattice, transpose.

Compiled where there is a GPU, else interpreted.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import BlockPattern
from dilated_attention_pytorch.candidates import CandidateRule, count_forced, row_ranges
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.selection.top_k import choose_top_k

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch.ops.block_selection.choice import choose_op
from dilated_attention_pytorch.ops.block_selection.interface import (
    transpose_lists,
)
from dilated_attention_pytorch.ops.block_selection.lattice import lattice_op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def intervals(rows: int, columns: int, *, forced: bool) -> Tensor:
    """Causal rows of ``columns`` key blocks, with a sink and the diagonal forced or nothing."""
    i = torch.arange(rows)
    end = (i + 1 + columns - rows).clamp(0, columns)
    nothing = torch.zeros_like(i)
    near = (end - 1, end) if forced else (nothing, nothing)
    parts = (nothing, end, nothing + int(forced), *near)
    return torch.stack(parts)[None].int().to(DEVICE)


def allowed_of(rule: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    low, end, sink, first, last = (x[..., None] for x in rule[:, None].unbind(2))
    j = torch.arange(columns, device=DEVICE)
    visible = (j >= low) & (j < end)
    must = visible & ((j < sink) | ((j >= first) & (j < last)))
    return visible & ~must, must


def lists_of(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Dense booleans, after checking that the lists ascend."""
    used = torch.arange(indices.shape[-1], device=DEVICE) < counts[..., None]
    dense = torch.zeros(*indices.shape[:3], columns + 1, dtype=torch.bool, device=DEVICE)
    dense.scatter_(3, torch.where(used, indices, columns).long(), True)
    steps = indices[..., 1:] > indices[..., :-1]
    assert (steps | ~used[..., 1:]).all()
    assert indices[~used].eq(0).all()
    return dense[..., :columns]


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("columns", [3, 33, 70, 304])
def test_choice_equals_top_k_with_ties_and_odd_values(forced: bool, columns: int) -> None:
    rows, plane = 6, (2, 2)
    # Few distinct values: many ties.
    scores = randn(*plane, rows, columns).mul(2).round()
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0], device=DEVICE)
    place = torch.arange(scores.numel(), device=DEVICE).view(scores.shape)
    scores = torch.where(place % 7 == 0, odd[place % 5], scores)
    rule = intervals(rows, columns, forced=forced)
    scored, must = allowed_of(rule, columns)
    budget = torch.arange(rows, device=DEVICE).int() * 2 + 1
    budget = budget.expand(*plane, rows).contiguous()
    counts, indices, kept, flags = choose_op(
        scores, None, rule, budget, None, None, 0, 0, columns, True
    )
    want = choose_top_k(scores, scored, (budget - must.sum(-1)).clamp(min=0), columns) | must
    assert torch.equal(lists_of(counts, indices, columns), want)
    used = torch.arange(columns, device=DEVICE) < counts[..., None]
    picked = scores.gather(-1, indices.long())
    assert torch.equal(kept[used].nan_to_num(7), picked[used].nan_to_num(7))
    assert torch.equal(flags.bool(), scored.expand_as(scores).gather(-1, indices.long()) & used)


def test_a_fixed_count_and_listed_candidates() -> None:
    columns = 40
    rule = intervals(4, columns, forced=True)
    listed = torch.tensor([0, 3, 4, 9, 30, 36, 37, 38, 39, -1, -1], device=DEVICE).int()
    listed = listed.expand(1, 1, 4, -1).contiguous()
    scores = randn(1, 2, 4, listed.shape[-1])
    counts, indices, *_ = choose_op(scores, listed, rule, None, None, None, 2, 0, 9, False)
    scored, must = allowed_of(rule, columns)
    at = listed.clamp(min=0).long()
    real = (listed >= 0).expand(scores.shape)
    free = scored.expand(1, 2, 4, -1).gather(-1, at.expand(scores.shape)) & real
    chosen = choose_top_k(scores, free, torch.full((1, 2, 4), 2, device=DEVICE), 2)
    want = torch.zeros(1, 2, 4, columns, dtype=torch.bool, device=DEVICE)
    want.scatter_(3, at.expand(scores.shape), chosen)
    forced = must.expand(1, 2, 4, -1).gather(-1, at.expand(scores.shape)) & real
    every = torch.zeros_like(want).scatter_(3, at.expand(scores.shape).where(forced, 0), True)
    assert torch.equal(lists_of(counts, indices, columns), want | (every & must))


def test_noise_samples_like_the_softmax_and_random_blocks_are_uniform() -> None:
    # Interpreted programs take 0.1 s each.
    rows, far = (2000, 0.04) if DEVICE.type == "cuda" else (40, 0.25)
    share = torch.tensor([0.5, 0.25, 0.125, 0.125], device=DEVICE)
    scores = share.log().expand(1, 1, rows, 4).contiguous()
    rule = torch.tensor([0, 4, 0, 0, 0]).view(1, 5, 1).expand(1, 5, rows)
    rule = rule.int().contiguous().to(DEVICE)
    seed, one = torch.tensor(5, device=DEVICE), torch.ones((), device=DEVICE)
    counts, indices, *_ = choose_op(scores, None, rule, None, seed, one, 1, 0, 1, False)
    assert counts.eq(1).all()
    found = torch.bincount(indices.flatten(), minlength=4) / rows
    torch.testing.assert_close(found, share, atol=far, rtol=0)
    # One scored block, always the last, and one random one: each of the others is as likely.
    scores = torch.cat([scores, scores.new_full((1, 1, rows, 1), 99.0)], -1)
    rule[:, 1] = 5

    def draw(seed: torch.Tensor, chosen: int = 1, explore: int = 1) -> tuple[torch.Tensor, ...]:
        return choose_op(scores, None, rule, None, seed, one, chosen, explore, 5, False)

    counts, indices, *_ = draw(seed)
    assert counts.eq(2).all()
    assert indices[..., 1].eq(4).all()
    uniform = torch.bincount(indices[..., 0].flatten(), minlength=4) / rows
    torch.testing.assert_close(uniform, torch.full_like(share, 0.25), atol=far, rtol=0)
    # One less for each but the first that is chosen, and never none (of five blocks).
    assert [int(draw(seed, n, 3)[0].unique()) for n in range(4)] == [3, 4, 4, 4]
    again, other = draw(seed)[1], draw(seed + 1)[1]
    assert torch.equal(indices, again)
    assert not torch.equal(indices, other)


@pytest.mark.parametrize(("rows", "columns", "density"), [
    (1, 1, 1.0), (40, 70, 0.3), (33, 5, 0.9), (64, 64, 0.0), (65, 130, 0.1),
    # More than one program takes the columns of a plane.
    (530, 540, 0.02),
])  # fmt: skip
def test_transpose_equals_sorting(rows: int, columns: int, density: float) -> None:
    dense = torch.rand(2, 2, rows, columns, generator=torch.Generator().manual_seed(0)) < density
    pattern = BlockPattern.from_dense(dense, q_len=rows, kv_len=columns, block_size=1)
    want = pattern.transpose()
    got = transpose_lists(pattern.to(DEVICE))
    assert torch.equal(got.offsets.cpu(), want.offsets)
    for b in range(2):
        for h in range(2):
            end = int(want.offsets[b, h, -1])
            assert torch.equal(got.slots[b, h, :end].cpu(), want.slots[b, h, :end])


RULES = [
    {"causal": False},
    {"causal": True},
    {"causal": True, "num_local_blocks": 2, "num_sink_blocks": 1},
    {"causal": False, "num_local_blocks": 1, "num_sink_blocks": 2},
]


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize(("padded", "diagonal"), [(False, True), (True, False), (True, True)])
def test_lattice_lists_what_the_enumeration_allows(
    settings: dict, diagonal: bool, padded: bool
) -> None:
    if settings["causal"] and not diagonal:
        pytest.skip("causal masks have a diagonal")
    lengths = torch.tensor([28, 13], device=DEVICE) if padded else None
    mask = AttentionMask(28, 28, settings["causal"], 0, lengths)
    rows = row_ranges(mask, (2, 2), has_diagonal=diagonal, device=DEVICE)
    rule = CandidateRule(
        num_heads=3, num_key_blocks=14, block_size=2, segment_lengths=(8, 24, 28),
        dilation_rates=(1, 2, 3), **settings,
    )  # fmt: skip
    segments, rates = zip(*rule.groups(), strict=True)
    candidates, forced, limit = lattice_op(
        rule.intervals(rows), rows.diagonal_first[:, 0].contiguous(), list(segments), list(rates),
        3, rule.num_sink_blocks, rule.near_width(rows),
    )  # fmt: skip
    assert candidates.shape[-1] == rule.width(rows)
    built = rule.build(rows)
    assert built.indices is not None
    want = torch.zeros(*limit.shape, 15, dtype=torch.bool, device=DEVICE)
    visible = built.scored | built.forced
    index = torch.where(visible, built.indices, 14).expand(*limit.shape, -1)
    want.scatter_(3, index, True)
    assert torch.equal(lists_of(limit, candidates.where(candidates >= 0, 0), 14), want[..., :14])
    assert torch.equal(forced, built.forced.sum(-1).int().expand_as(forced))


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize("diagonal", [False, True])
def test_counting_forced_blocks(settings: dict, diagonal: bool) -> None:
    mask = AttentionMask(36, 30, settings["causal"], -6 if settings["causal"] else 0)
    rows = row_ranges(mask, (2, 2), has_diagonal=diagonal, device=DEVICE)
    rule = CandidateRule(num_heads=1, num_key_blocks=15, block_size=2, **settings)
    forced, limit = count_forced(rule.intervals(rows))
    built = rule.build(rows)
    assert torch.equal(forced, built.forced.sum(-1).int())
    assert torch.equal(limit, (built.forced | built.scored).sum(-1).int())
