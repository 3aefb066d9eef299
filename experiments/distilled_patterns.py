"""What do average patterns, fixed, keep of a trained model?

Models are trained with adaptive attention, their patterns are averaged over a data set
(``distill_to_fixed``), and the fixed model is measured without further training: the needle task,
where the answer is anywhere or always one block back, and a byte-level language model.
See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.analysis import distill_to_fixed, record
from dilated_attention_pytorch.tasks.needle import evaluate_needle
from dilated_attention_pytorch.tasks.text import load_text
from dilated_attention_pytorch.train.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
    next_byte_loss,
)
from harness import Cell, Experiment, Runs, average, bars, run, spread, verdict
from needle_cells import train_cell

SAMPLES = 64


def execute(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Trains, distils, measures both."""
    if settings.get("text"):
        return _text(seed, quick, device)
    needle_run, model, result = train_cell(settings, seed, quick, device)
    batch = needle_run.task.batch(SAMPLES, torch.Generator().manual_seed(9))
    recording = record(
        model, [batch.to(torch.device(device))], max_samples=SAMPLES, measure_mass=False
    )
    fixed = distill_to_fixed(recording).apply(model)
    accuracy, _, sparsity = evaluate_needle(needle_run, fixed)
    assert sparsity is not None
    return {"before": result["accuracy"], "after": accuracy, "sparsity": sparsity}


def _text(seed: int, quick: bool, device: str) -> dict[str, Any]:
    config = AdaptiveConfig(block_size=16, base_sparsity=0.8, query_scope="past", budget="fixed")
    lm_run = LanguageModelRun(
        config=config, steps=3 if quick else 500, seq_len=128 if quick else 512, seed=seed,
        validation_sequences=4 if quick else 64, threads=1, device=device,
    )  # fmt: skip
    text = load_text(max_bytes=200_000 if quick else 8_000_000, seq_len=lm_run.seq_len)
    training = LanguageModelTraining(lm_run, text)
    while not training.done:
        training.step()
    # Distilled on training text, measured on held-out text.
    windows = training.windows.next_batch(SAMPLES)[:, :-1].to(device)
    recording = record(training.model, [windows], max_samples=SAMPLES, measure_mass=False)
    fixed = distill_to_fixed(recording).apply(training.model).eval()
    with torch.no_grad():
        after = next_byte_loss(fixed, training.validation.to(device)).item()
    measured = training.validate()
    assert measured.sparsity is not None
    return {"before": measured.loss, "after": after, "sparsity": measured.sparsity}


def finding(runs: Runs) -> str:
    """Which models lose by it, each in its own unit."""
    kept, lost = [], []
    for cell in CELLS:
        before, after = (average(runs, cell.name, key) for key in ("before", "after"))
        worse = after - before if cell.settings.get("text") else before - after
        if worse <= max(0.02, spread(runs, [cell.name], "before")):
            kept.append(cell.name)
        else:
            lost.append(f"{cell.name} ({before:.3f} before, {after:.3f} after)")
    return verdict(not lost) + (
        f"fixed patterns lose {'; '.join(lost) or 'nothing'}, and keep "
        f"{'; '.join(kept) or 'nothing'}."
    )


CELLS = [
    Cell("needle anywhere, accuracy"),
    Cell("needle one block back, accuracy", {"task": {"target": "previous"}}),
    Cell("text, nats per byte", {"text": True}),
]
EXPERIMENT = Experiment(
    "distilled_patterns",
    "Learned patterns can be transferred to fixed ones.",
    CELLS,
    execute,
    {"before": "adaptive", "after": "fixed", "sparsity": "sparsity"},
    finding,
    lambda runs: bars(runs, "after", "after distillation"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
