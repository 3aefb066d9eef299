"""Counts of blocks above a threshold against the PyTorch function that they replace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import CandidateRule, RowRange, row_ranges
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.selection.budget import blocks_above

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch.ops.block_selection import threshold as kernels
from dilated_attention_pytorch.ops.block_selection.interface import count_above, find_candidates

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 8


def problem(
    blocks: int, heads: int, lengths: list[int] | None = None, **rule: object
) -> tuple[RowRange, CandidateRule]:
    known = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    mask = AttentionMask(blocks * SIZE, blocks * SIZE, True, key_lengths=known)
    rows = row_ranges(mask, (SIZE, SIZE), has_diagonal=True, device=DEVICE)
    settings = {"num_local_blocks": 1, "num_sink_blocks": 1, **rule}
    return rows, CandidateRule(
        num_heads=heads, num_key_blocks=blocks, block_size=SIZE, causal=True, **settings
    )  # fmt: skip


def draw(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to(DEVICE)


def bounds(rows: int) -> Tensor:
    return torch.arange(rows, device=DEVICE).view(1, 1, -1) // 2 + 1


class Both:
    """The kernel and the PyTorch function on the same scores ``(b, p, i, j)``."""

    def __init__(
        self, rows: RowRange, rule: CandidateRule, scores: Tensor, most: Tensor | None = None
    ) -> None:
        self.scores, self.intervals = scores, rule.intervals(rows)
        self.most = bounds(scores.shape[2]) if most is None else most
        # Rounding is the same: powers of two and sums of two.
        self.weights = torch.tensor([1.0, 0.5, 0.75], device=DEVICE)[
            torch.arange(scores.shape[1]) % 3
        ]
        self.candidates = rule.build(rows)
        self.lists = find_candidates(rule, rows, self.intervals)[0]

    def of(self, columns: Tensor | None) -> Tensor:
        """Scores of a list's blocks."""
        if columns is None:
            return self.scores
        places = columns.clamp(0, self.scores.shape[3] - 1).long()
        return self.scores.gather(3, places.expand(self.scores.shape[0], -1, -1, -1))

    def wanted(self, threshold: float) -> Tensor:
        cut, columns = torch.tensor(threshold, device=DEVICE), self.candidates.indices
        return blocks_above(
            self.of(columns), self.candidates.scored, cut, self.most, self.weights,
            heads_compete=columns is None,
        )  # fmt: skip

    def found(self, threshold: float) -> Tensor:
        cut = torch.tensor(threshold, device=DEVICE)
        return count_above(
            self.of(self.lists), self.lists, self.intervals, cut, self.most, self.weights
        )

    def away_from_masses(self, threshold: float) -> float:
        """A threshold near this one that rounding of the masses does not reach."""
        while not torch.equal(self.wanted(threshold * 0.9999), self.wanted(threshold * 1.0001)):
            threshold *= 1.0003
        return threshold

    def agree(self, *thresholds: float) -> None:
        for threshold in thresholds:
            cut = self.away_from_masses(threshold)
            want, got = self.wanted(cut), self.found(cut)
            assert got.dtype == torch.int32
            assert torch.equal(got, want)


@pytest.mark.parametrize("blocks", [1, 7, 33])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_as_many_as_in_pytorch(blocks: int, heads: int) -> None:
    both = Both(*problem(blocks, heads), draw(2, heads, blocks, blocks))
    both.agree(1e-5, 0.01, 0.06, 0.3)
    assert not both.found(64.0).any()
    if blocks > 7:
        assert both.found(0.01).any()


def test_heads_compete_for_columns_alone() -> None:
    rows, rule = problem(16, 2)
    scores = draw(1, 1, 16, 16).expand(1, 2, 16, 16)
    alone = Both(rows, rule, scores)
    alone.weights = torch.ones(2, device=DEVICE)
    alone.agree(0.2)
    # Two heads that ask for the same take nothing from each other; one that asks for more does.
    cut = alone.away_from_masses(0.2)
    assert torch.equal(alone.found(cut)[:, 0], alone.found(cut)[:, 1])
    sharper = Both(rows, rule, torch.cat([scores[:, :1], 1.5 * scores[:, :1]], 1))
    sharper.weights = alone.weights
    sharper.agree(0.2)
    assert int(sharper.found(cut)[:, 0].sum()) < int(alone.found(cut)[:, 0].sum())


@pytest.mark.parametrize(("tile", "heads"), [(64, 2), (4096, 40), (4096, 130)])
def test_rows_of_several_tiles_and_many_heads(
    tile: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_TILE", tile)
    blocks = 80 if heads == 2 else 34
    rows, rule = problem(blocks, heads)
    both = Both(rows, rule, draw(1, heads, blocks, blocks), bounds(blocks) * 2)
    both.agree(0.002, 0.02)


@pytest.mark.parametrize("tile", [32, 4096])
def test_lists_of_candidates(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TILE", tile)
    rows, rule = problem(40, 4, segment_lengths=(128, 320), dilation_rates=(1, 2))
    both = Both(rows, rule, draw(1, 4, 40, 40))
    assert both.lists is not None
    assert both.lists.shape[-1] > 32
    both.agree(0.02)


def test_samples_and_heads_of_their_own() -> None:
    rows, rule = problem(9, 2, [72, 20, 0], num_local_blocks=0)
    most = torch.arange(54, device=DEVICE).view(3, 2, 9) % 3
    both = Both(rows, rule, draw(3, 2, 9, 9), most)
    both.agree(0.02, 0.1)
    assert not both.found(0.02)[2].any()
    assert int(both.found(1e-5).max()) == 2


def test_what_is_no_number_counts_as_in_pytorch() -> None:
    rows, rule = problem(9, 2, num_local_blocks=0, num_sink_blocks=0)
    scores = draw(1, 2, 9, 9)
    scores[..., ::3] = float("nan")
    scores[..., 1] = -float("inf")
    scores[:, 0, 5] = float("nan")
    scores[:, 1, 7, 2] = float("inf")
    both = Both(rows, rule, scores)
    both.agree(0.08, 0.14)
    assert both.found(0.14)[0, 0, 5] == 3
    assert both.found(1e-5)[0, 1, 7] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_may_have_strides_and_half_precision(dtype: torch.dtype) -> None:
    both = Both(*problem(9, 2), draw(2, 9, 2, 9).to(dtype).transpose(1, 2))
    both.agree(0.1)
    both.scores = draw(2, 2, 9, 9).to(dtype).transpose(2, 3)
    both.agree(0.1)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0)])
def test_nothing_to_count(shape: tuple[int, ...]) -> None:
    scores = torch.zeros(shape, device=DEVICE)
    intervals = torch.zeros(1, 5, shape[2], dtype=torch.int32, device=DEVICE)
    cut, most = torch.tensor(0.1, device=DEVICE), bounds(shape[2])
    found = count_above(scores, None, intervals, cut, most, torch.ones(shape[1], device=DEVICE))
    assert torch.equal(found, torch.zeros(shape[:3], dtype=torch.int32, device=DEVICE))


def test_the_operator_passes_the_checks_of_pytorch() -> None:
    from dilated_attention_pytorch.ops.block_selection.threshold import above_op

    rows, rule = problem(5, 2)
    given = (draw(1, 2, 5, 5), None, rule.intervals(rows), torch.tensor(0.1, device=DEVICE))
    torch.library.opcheck(above_op, (*given, bounds(5).int(), torch.ones(2, device=DEVICE)))
