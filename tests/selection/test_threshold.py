"""Thresholds: what they keep, and how they are calibrated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import RowRange
from dilated_attention_pytorch.selection.budget import water_level_budget
from dilated_attention_pytorch.selection.threshold import (
    ThresholdSample,
    ThresholdTable,
    calibrate_threshold,
    floor_budget,
    threshold_budget,
    thresholds_at,
    visible_softmax,
)


def sample(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, what may be chosen, what is forced, and how many are visible, causal."""
    scores = 3 * torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    visible = torch.tril(torch.ones(12, 12, dtype=torch.bool))[None, None]
    forced = torch.eye(12, dtype=torch.bool)[None, None]
    allowed = visible.sum(-1)
    return scores, visible & ~forced, forced, allowed


def test_softmax_runs_over_what_is_visible() -> None:
    scores, scored, forced, _ = sample()
    p = visible_softmax(scores, scored, forced)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, 12))
    assert bool((p[..., 0, 1:] == 0).all())
    scores[0, 0, 5, 2] = torch.nan
    assert float(visible_softmax(scores, scored, forced)[0, 0, 5, 2]) == 0
    nothing = torch.zeros_like(scored)
    assert bool((visible_softmax(scores, nothing, nothing) == 0).all())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_calibration_meets_the_sparsity_and_keeps_the_most(sparsity: float) -> None:
    parts = [sample(seed) for seed in (0, 1)]
    threshold = calibrate_threshold([ThresholdSample.of(*part) for part in parts], sparsity)
    kept, allowed, expected = 0, 0, []
    for scores, scored, forced, num_allowed in parts:
        count = threshold_budget(scores, scored, forced, threshold)
        kept += int(count.sum()) + 2 * 3 * 12
        allowed += int(num_allowed.expand(2, 3, 12).sum())
        p = visible_softmax(scores, scored, forced)[scored.expand(scores.shape)]
        expected.append((p, p >= threshold))
    assert 1 - kept / allowed == pytest.approx(sparsity, abs=1 / allowed)
    # No other choice of as many tiles, over heads, rows and samples, expects more.
    p, chosen = (torch.cat(x) for x in zip(*expected, strict=True))
    assert float(p[chosen].sum()) == pytest.approx(float(p.topk(int(chosen.sum())).values.sum()))


def test_calibration_at_the_ends() -> None:
    part = ThresholdSample.of(*sample())
    scores, scored, forced, _ = sample()
    everything = calibrate_threshold([part], 0.0)
    assert torch.equal(
        threshold_budget(scores, scored, forced, everything),
        scored.sum(-1).expand(2, 3, 12).int(),
    )
    nothing = calibrate_threshold([part], 0.99)
    assert int(threshold_budget(scores, scored, forced, nothing).sum()) == 0
    with pytest.raises(ValueError, match="at least one"):
        calibrate_threshold([], 0.5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_calibration_above_a_floor_meets_the_sparsity(share: float) -> None:
    parts, sparsity = [sample(seed) for seed in (0, 1)], 0.6
    number = torch.arange(12).view(1, 1, -1)
    low = torch.zeros_like(number)
    rows = RowRange(low, number + 1, number, number, True, low)
    samples, kept, starved = [], 0, 0
    for part in parts:
        _, scored, forced, allowed = part
        least = floor_budget(share, sparsity, forced.sum(-1), allowed, rows, 12)
        # Each row's even budget is between its forced block and all that it sees.
        assert bool(((least >= 1) & (least <= allowed)).all())
        samples.append(ThresholdSample.of(*part, least))
    threshold = calibrate_threshold(samples, sparsity)
    for scores, scored, forced, _ in parts:
        count = 1 + threshold_budget(scores, scored, forced, threshold)
        starved += int((count < least).sum())
        kept += int(torch.maximum(count, least).sum())
    total = 2 * 2 * 3 * 78
    assert 1 - kept / total == pytest.approx(sparsity, abs=1 / total)
    assert (starved > 0) == (share > 0)


def test_the_floor_is_a_share_of_the_even_budget() -> None:
    blocks = torch.arange(64).view(1, 1, -1)
    low = torch.zeros_like(blocks)
    rows = RowRange(low, blocks + 1, blocks, blocks, True, low)
    forced, limit = (blocks + 1).clamp(max=2), blocks + 1
    even = water_level_budget(torch.full((1, 1, 64), 0.2), forced, limit, rows, 64)
    for share in (0.0, 0.25, 0.9):
        least = floor_budget(share, 0.8, forced, limit, rows, 64)
        exact = forced + share * (even - forced)
        assert float((least.cumsum(-1) - exact.cumsum(-1)).abs().max()) <= 0.5 + 1e-3


def test_table_interpolates_between_logarithms() -> None:
    table = ThresholdTable((100, 400, 800), (0.08, 0.02, 0.01))
    assert table.at(50) == pytest.approx(0.16)
    assert table.at(100) == 0.08
    assert table.at(200) == pytest.approx(0.04)
    assert table.at(400) == pytest.approx(0.02)
    assert table.at(8_000) == pytest.approx(0.001)
    assert ThresholdTable.from_buffer(table.to_buffer()) == table


@pytest.mark.parametrize(
    ("lengths", "thresholds"),
    [((1, 2), (0.1,)), ((1,), (0.1, 0.2)), ((), ())],
)
def test_incomplete_tables_are_refused(
    lengths: tuple[int, ...], thresholds: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="thresholds must be one for each length"):
        ThresholdTable(lengths, thresholds)


@pytest.mark.parametrize("entries", [1, 2, 4])
def test_many_lengths_at_once(entries: int) -> None:
    lengths, values = [100, 300, 1000, 1001][:entries], [0.3, 0.2, 0.05, 0.049][:entries]
    table = ThresholdTable(tuple(lengths), tuple(values))
    asked = [0, 1, 99, 100, 101, 250, 300, 700, 1000, 1001, 5000]
    rows = torch.tensor(list(zip(lengths, values, strict=True)), dtype=torch.float64)
    found = thresholds_at(rows, torch.tensor(asked))
    assert found.tolist() == pytest.approx([table.at(n) for n in asked])
