"""Cells of the needle task: what several experiments vary about one training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from dilated_attention_pytorch.tasks.needle import (
    NeedleModel,
    NeedleRun,
    NeedleTask,
    build_needle_model,
    needle_config,
    train_needle,
)

QUICK_TASK = {"seq_len": 64, "num_keys": 8}
# In results/needle adaptive attention is at its final accuracy by step 750 of 2,000, and so are the
# fixed patterns.
STEPS = 1000
EVALUATE_EVERY = 100


def train_cell(
    settings: Mapping[str, Any], seed: int, quick: bool, device: str
) -> tuple[NeedleRun, NeedleModel, dict[str, Any]]:
    """Trains one cell.

    Args:
        settings: ``"task"``, ``"config"`` (with ``"scored_blocks"``) and ``"run"``: changes of
            the defaults; ``"attention"``: a name of ``build_attention``.
        seed: Of weights and data.
        quick: Four steps of a tiny task.
        device: Where to train.

    Returns:
        The run, the trained model, and accuracy, recall, sparsity, seconds, curve and the step
        (of those measured) that first reached an accuracy of 0.9, None if none did.
    """
    task = NeedleTask(**settings.get("task", {}))
    changes: dict[str, Any] = {"steps": STEPS, **settings.get("run", {})}
    if quick:
        task = replace(task, **QUICK_TASK)
        changes |= {"steps": 4, "batch_size": 2}
    run = NeedleRun(
        settings.get("attention", "adaptive"),
        needle_config(task, **settings.get("config", {})),
        seed=seed,
        device=device,
        task=task,
        **changes,
    )
    model = build_needle_model(run)
    curve = [asdict(progress) for progress in train_needle(run, model, EVALUATE_EVERY)]
    last = curve[-1]
    result = {key: last[key] for key in ("accuracy", "recall", "sparsity", "seconds")}
    result["steps_to_90"] = next((x["step"] for x in curve if x["accuracy"] >= 0.9), None)
    return run, model, {**result, "curve": [[x["step"], x["accuracy"]] for x in curve]}


def execute(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Trains one cell and returns its numbers."""
    return train_cell(settings, seed, quick, device)[2]
