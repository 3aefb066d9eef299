"""The search for the sparsity to calibrate at, and the evaluation that uses it."""

from __future__ import annotations

import pytest
import torch

from tiny_models import tiny_model

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.hf.calibration import MOST_TRIES, find_calibration_target
from dilated_attention_pytorch.hf.evaluate import (
    Evaluation,
    EvaluationSettings,
)


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
