"""The trainings of the demo; each runs in a process of its own, on one thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dilated_attention_pytorch.cli.workers import Report
from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.tasks.needle import (
    NeedleRun,
    NeedleTask,
    build_needle_model,
    needle_config,
    train_needle,
)
from dilated_attention_pytorch.tasks.text import load_text
from dilated_attention_pytorch.train.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
)

# Bytes that a reader of the page sees as they are.
_READABLE = frozenset({9, 10, *range(32, 127)})


@dataclass(frozen=True)
class DemoSize:
    """How much to train.

    Attributes:
        needle: The needle task, smaller than that of ``experiments/needle.py``. Dense attention and
            the best fixed pattern leave their initial plateau within the steps below; with 500
            steps they did not.
        needle_steps: Optimiser steps on it.
        needle_every: Steps between two measurements.
        text_steps: Optimiser steps on text.
        text_bytes: Bytes of text to use at most.
        seq_len: Bytes per sequence of text.
    """

    needle: NeedleTask = field(default_factory=lambda: NeedleTask(seq_len=384, num_keys=48))
    needle_steps: int = 1200
    needle_every: int = 100
    text_steps: int = 120
    text_bytes: int = 4_000_000
    seq_len: int = 512


QUICK = DemoSize(
    needle=NeedleTask(seq_len=64, num_keys=8),
    needle_steps=4,
    needle_every=2,
    text_steps=12,
    text_bytes=200_000,
    seq_len=128,
)


def needle_job(report: Report, method: str, size: DemoSize) -> dict[str, Any]:
    """Trains one method on the needle task."""
    torch.set_num_threads(1)
    task = size.needle
    run = NeedleRun(
        method,
        needle_config(task),
        steps=size.needle_steps,
        batch_size=8,
        learning_rate=5e-3,
        task=task,
    )
    model = build_needle_model(run)
    curve = []
    for progress in train_needle(run, model, size.needle_every):
        curve.append([progress.step, progress.accuracy])
        report(progress.step / run.steps, f"accuracy {progress.accuracy:.2f}")
    batch = task.batch(1, torch.Generator().manual_seed(7))
    model.eval()
    with torch.no_grad():
        logits, answers = model(batch)
        infos = model.transformer.patterns(model.embed(batch))
    blocks = task.seq_len // task.block_size
    return {
        "curve": curve,
        "accuracy": progress.accuracy,
        "sparsity": 0.0 if progress.sparsity is None else progress.sparsity,
        "seconds": progress.seconds,
        "layers": block_lists(infos, run.num_layers, blocks),
        "answers": batch.target[0].tolist(),
        # Nothing is asked in the first block.
        "right": [None, *(logits.argmax(-1) == answers).tolist()],
    }


def text_job(report: Report, method: str, size: DemoSize) -> dict[str, Any]:
    """Trains one method as a byte-level language model."""
    text = load_text(max_bytes=size.text_bytes, seq_len=size.seq_len)
    # A fixed budget, so that every sparse method computes exactly as many tiles; the block before
    # is read by all, since no choice is as sure to help as that one.
    config = AdaptiveConfig(
        block_size=16, base_sparsity=0.75, query_scope="past", budget="fixed", num_local_blocks=1
    )
    run = LanguageModelRun(
        attention=method,
        config=config,
        seq_len=size.seq_len,
        batch_size=4,
        steps=size.text_steps,
        validation_sequences=64,
        threads=1,
    )
    training = LanguageModelTraining(run, text)
    losses: list[float] = []
    curve = []
    every = max(1, size.text_steps // 15)
    while not training.done:
        losses.append(training.step().loss)
        if len(losses) == every or training.done:
            mean = sum(losses) / len(losses)
            curve.append([training.step_count, mean])
            report(training.step_count / run.steps, f"loss {mean:.2f}")
            losses = []
    measured = training.validate()
    window = _readable_window(training.validation)
    with torch.no_grad():
        infos = training.model.eval().patterns(window[None, :-1])
    shown = bytes(window[:-1].tolist())
    cuts = range(0, len(shown), config.block_size)
    return {
        "curve": curve,
        "loss": measured.loss,
        "bits": measured.bits_per_byte,
        "sparsity": 0.0 if measured.sparsity is None else measured.sparsity,
        "seconds": training.seconds,
        "layers": block_lists(infos, run.num_layers, len(cuts)),
        "blocks": [shown[a : a + config.block_size].decode("ascii", "replace") for a in cuts],
        "block_size": config.block_size,
        "seen_bytes": run.steps * run.batch_size * run.seq_len,
        "heads": run.num_heads,
    }


def block_lists(
    infos: list[dict[str, Any]], num_layers: int, blocks: int
) -> list[list[list[list[int]]]]:
    """Key blocks by layer, head and query block of the first sample; no infos: dense."""
    if not infos:
        everything = [list(range(row + 1)) for row in range(blocks)]
        return [[everything] for _ in range(num_layers)]
    return [
        [
            [row.nonzero().flatten().tolist() for row in head]
            for head in info["pattern"].to_dense()[0]
        ]
        for info in infos
    ]


def _readable_window(windows: torch.Tensor) -> torch.Tensor:
    """The held-out window that reads most like prose: in the library, a docstring amid code."""

    def letters(window: torch.Tensor) -> float:
        values = window.tolist()
        if not _READABLE.issuperset(values):
            return 0.0
        return sum(value == 32 or 97 <= value <= 122 for value in values) / len(values)

    return max(windows, key=letters)
