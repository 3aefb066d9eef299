"""The search for the sparsity to calibrate at, and the evaluation that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter
from dilated_attention_pytorch.hf.calibration import (
    MOST_TRIES,
    calibrate,
    find_calibration_target,
)
from dilated_attention_pytorch.hf.evaluate import (
    Evaluation,
    EvaluationSettings,
)
from dilated_attention_pytorch.hf.observe import CountTiles
from dilated_attention_pytorch.hf.train_selectors import distilled_config
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig

CONFIG = distilled_config(
    block_size=16, base_sparsity=0.5, num_sink_blocks=1, scorer="bilinear",
    pooling=("mean", "max", "min", "attention"),
)  # fmt: skip


def text(length: int = 3000) -> Tensor:
    """Tokens in which a few recur, so that attention has something to look for."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 40, (length,), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("drift", [0.0, -0.03, 0.04])
@pytest.mark.parametrize("slope", [1.0, 0.6, 1.7])
def test_the_wanted_sparsity_is_met(drift: float, slope: float) -> None:
    """On text of which thresholds leave out less, or more, than where they were calibrated."""
    aims: list[float] = []

    def measure(aim: float) -> float:
        aims.append(aim)
        return 0.9 - drift + slope * (aim - 0.9)

    aim, found = find_calibration_target(measure, 0.9, 0.0005)
    assert 0.9 <= found <= 0.9005
    assert (aim, len(aims) > 1) == (aims[-1], drift != 0)


def test_what_forced_blocks_prevent_is_missed_by_as_little_as_can_be() -> None:
    aims: list[float] = []

    def measure(aim: float) -> float:
        aims.append(aim)
        return min(0.88, aim - 0.03)

    aim, found = find_calibration_target(measure, 0.9, 0.0005)
    assert found == 0.88
    assert aim in aims
    assert len(aims) == 3


def test_the_search_ends() -> None:
    """Where the sparsity jumps over what is wanted."""
    aims: list[float] = []

    def measure(aim: float) -> float:
        aims.append(aim)
        return 0.95 if aim > 0.9 else 0.8 + 0.01 * aim

    assert find_calibration_target(measure, 0.9, 0.0005)[1] == 0.95
    assert len(aims) == MOST_TRIES


def test_falling_short_is_worse_than_exceeding() -> None:
    """A sparsity that comes in steps, as of few blocks."""
    aim, found = find_calibration_target(lambda aim: 0.92 if aim > 0.895 else 0.89, 0.9, 0.001)
    assert (aim, found) == (0.9, 0.92)
    assert find_calibration_target(lambda aim: 0.92 if aim > 0.905 else 0.89, 0.9, 0.001)[1] == 0.92


def test_an_evaluation_meets_the_sparsity_on_what_it_measures() -> None:
    """Text of one token to calibrate on, of many to measure."""
    torch.manual_seed(0)
    tokens = torch.cat([torch.full((256,), 7), torch.randint(2, 40, (768,))]).int()
    settings = {
        "lengths": (128,), "sparsities": (0.5,), "baselines": ("oracle:threshold", "oracle"),
        "block_size": 16, "windows": 2, "repeats": 0,
    }  # fmt: skip
    model = tiny_model()
    off, fixed = Evaluation(
        model, {"random": tokens}, EvaluationSettings(**settings, tolerance=None)
    ).rows()
    met, same = Evaluation(
        model, {"random": tokens}, EvaluationSettings(**settings, tolerance=0.02)
    ).rows()
    assert not 0.5 <= off["measured_sparsity"] <= 0.52
    assert "aim" not in off
    assert 0.5 <= met["measured_sparsity"] <= 0.52
    assert met["aim"] != 0.5
    assert met["perplexity"] != off["perplexity"]
    # As many blocks in every row need no thresholds.
    assert same == {**fixed, "tokens_per_second": same["tokens_per_second"]}
    with pytest.raises(ValueError, match=r"tolerance must lie in \(0, 1\) or be None, got 0"):
        EvaluationSettings(tolerance=0)


def test_calibration_meets_the_sparsity_of_the_sparse_model() -> None:
    model = tiny_model()
    configs: dict[int, Any] = {
        0: CONFIG, 1: TrainingFreeConfig(method="mean_pool", block_size=16, budget="threshold"),
    }  # fmt: skip
    with adapt(model, configs) as adapted:
        told: list[tuple[int, int]] = []
        calibrate(
            adapted, text(), 0.5, lengths=(128, 256), windows=3,
            report=lambda done, total: told.append((done, total)),
        )  # fmt: skip
        assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
        for length in (128, 256):
            with CountTiles(adapted) as tiles, torch.no_grad():
                for start in range(0, 1024, 256):
                    model(text()[None, start : start + length].long())
            assert tiles.sparsity == pytest.approx(0.5, abs=0.05)
        with pytest.raises(ValueError, match="at least 128 tokens"):
            calibrate(adapted, text(100), 0.5, lengths=(128,))


def test_thresholds_travel_with_the_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    with adapt(model, CONFIG) as adapted, torch.no_grad():
        with pytest.raises(RuntimeError, match="needs thresholds"):
            model(text(128)[None].long())
        calibrate(adapted, text(), 0.5, lengths=(64, 128), windows=2)
        wanted = model(text(128)[None].long()).logits
        adapter = SelectorAdapter.of(adapted)
    adapter.save_pretrained(tmp_path)
    with SelectorAdapter.from_pretrained(tmp_path).apply(model), torch.no_grad():
        found = model(text(128)[None].long()).logits
    assert torch.equal(found, wanted)
