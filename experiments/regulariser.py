"""What does the sparsity loss do?

Byte-level language models with an adaptive budget, trained with different weights of
``get_sparsity_loss``. Reported: how far the held-out sparsity ends from ``base_sparsity``, and the
held-out loss. See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.tasks.text import load_text
from dilated_attention_pytorch.train.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
)
from harness import Cell, Experiment, Runs, average, bars, run, verdict

WEIGHTS = (0.0, 0.01, 0.1, 1.0)
SPARSITY = 0.8


def execute(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Trains one language model."""
    lm_run = LanguageModelRun(
        config=AdaptiveConfig(block_size=16, base_sparsity=SPARSITY, query_scope="past"),
        sparsity_weight=settings["weight"],
        steps=3 if quick else 500,
        seq_len=128 if quick else 512,
        validation_sequences=4 if quick else 64,
        seed=seed,
        threads=1,
        device=device,
    )
    text = load_text(max_bytes=200_000 if quick else 8_000_000, seq_len=lm_run.seq_len)
    training = LanguageModelTraining(lm_run, text)
    while not training.done:
        training.step()
    measured = training.validate()
    assert measured.sparsity is not None
    return {
        "sparsity": measured.sparsity,
        "distance": abs(measured.sparsity - SPARSITY),
        "loss": measured.loss,
        "seconds": training.seconds,
    }


def finding(runs: Runs) -> str:
    """Whether some weight brings the sparsity closer to the target than none, and close."""
    away = {w: average(runs, f"{w:g}", "distance") for w in WEIGHTS}
    best = min(away, key=away.__getitem__)
    return verdict(best > 0 and away[best] < min(0.01, away[0.0] / 2)) + (
        f"the sparsity is {away[0.0]:.3f} from a target of {SPARSITY} without that loss, and "
        f"{away[best]:.3f} with a weight of {best:g}."
    )


EXPERIMENT = Experiment(
    "regulariser",
    "A sparsity loss keeps the sparsity at the desired level.",
    [Cell(f"{weight:g}", {"weight": weight}) for weight in WEIGHTS],
    execute,
    {"sparsity": "held-out sparsity", "loss": "held-out loss (nats per byte)"},
    finding,
    lambda runs: bars(runs, "distance", f"distance of the sparsity from {SPARSITY}"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
