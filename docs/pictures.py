"""Draws the pictures of the documentation from the code that they explain.

    python docs/pictures.py        # a few minutes on one core

Writes ``docs/pictures/*.png``. Trains one small model on the needle task.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dilated_attention_pytorch import fixed_pattern
from dilated_attention_pytorch.analysis import plots, record
from dilated_attention_pytorch.analysis.measures import measure_selectors
from dilated_attention_pytorch.analysis.recording import evaluation_mode, layer_mass, watch_layers
from dilated_attention_pytorch.tasks.needle import (
    NeedleModel,
    NeedleRun,
    NeedleTask,
    build_needle_model,
    needle_config,
    train_needle,
)

FOLDER = Path(__file__).parent / "pictures"
TASK = NeedleTask(seq_len=256, num_keys=40, num_values=8)
FIXED = ("local", "dilated", "strided", "hierarchical", "sink_local", "random")


def save(figure: Figure, name: str) -> None:
    """Writes one picture."""
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
    print(f"wrote {name}.png")


def train() -> tuple[NeedleModel, Figure]:
    """Trains on the needle task and draws what the selector holds as it learns."""
    run = NeedleRun(
        "adaptive", needle_config(TASK), steps=500, batch_size=16, learning_rate=6e-3, task=TASK
    )
    model = build_needle_model(run)
    batch = TASK.batch(16, torch.Generator().manual_seed(1))
    steps, curves = [0], {"chosen": [], "mean pooling": [], "chance": []}

    def measure() -> None:
        (found,) = measure_selectors(model, batch)
        curves["chosen"].append(found.captured(found.chosen))
        curves["mean pooling"].append(found.captured(found.by_mean_pooling))
        curves["chance"].append(found.captured_by_chance())

    measure()
    for progress in train_needle(run, model, evaluate_every=25):
        steps.append(progress.step)
        measure()
    print(f"accuracy {progress.accuracy:.3f} after {progress.step} steps")
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, values in curves.items():
        axis.plot(steps, values, label=name, linewidth=2.5 if name == "chosen" else 1.5)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("step")
    axis.set_ylabel("share of the attention\nto candidates")
    axis.legend()
    axis.grid(alpha=0.3)
    return model, figure


@torch.no_grad()
def pipeline(model: NeedleModel) -> Figure:
    """Scores, choice and dense attention of one head."""
    batch = TASK.batch(1, torch.Generator().manual_seed(2))
    passes = []
    with evaluation_mode(model), watch_layers(model, passes.append):
        model(batch)
    (seen,) = passes
    scores = seen.layer.score(seen.inputs)[0][0, 0]
    scored = seen.inputs.candidates.scored.expand(1, 2, *scores.shape)[0, 0]
    shares = scores.masked_fill(~scored, torch.finfo(scores.dtype).min).softmax(-1)
    kept = seen.pattern.to_dense()[0, 0]
    asked = (batch.answer[0] != -100).float()[None, :, None].expand(1, -1, 2)
    mass = layer_mass(seen, asked)[0, 0]
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = (
        (shares.masked_fill(~scored, torch.nan), "softmax of the scores"),
        (torch.where(kept, 1.0, torch.nan), "kept blocks (ring: the answer)"),
        (mass.masked_fill(mass == 0, torch.nan), "dense attention of the questions"),
    )
    for axis, (values, title) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.set_facecolor("#eceff2")
        axis.imshow(values.numpy(), cmap="viridis", interpolation="nearest")
        rows = range(1, len(values))
        axis.plot(
            batch.target[0, 1:].tolist(), list(rows), "o", mfc="none", mec="#d55e00", ms=9, mew=1.4
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("key block")
        axis.set_ylabel("query block")
    return figure


@torch.no_grad()
def beside(model: NeedleModel) -> Figure:
    """What one trained head reads, beside dense attention and a window of as many tiles."""
    batch = TASK.batch(1, torch.Generator().manual_seed(2))
    passes = []
    with evaluation_mode(model), watch_layers(model, passes.append):
        model(batch)
    kept = passes[0].pattern.to_dense()[0, 0]
    blocks = len(kept)
    every = torch.ones_like(kept).tril()
    sparsity = 1 - float(kept.sum() / every.sum())
    local = fixed_pattern(
        "local", TASK.seq_len, base_sparsity=sparsity, block_size=TASK.block_size, causal=True
    )
    rows = torch.arange(1, blocks)
    answers = batch.target[0, 1:]
    figure = Figure(figsize=(11, 4.1), layout="constrained")
    panels = (("dense", every), ("window", local.to_dense()[0, 0]), ("adaptive", kept))
    for axis, (name, read) in zip(figure.subplots(1, 3), panels, strict=True):
        found = read[rows, answers]
        axis.set_facecolor("#eceff2")
        axis.imshow(
            torch.where(read, 1.0, torch.nan).numpy(), cmap="Blues", vmin=0, vmax=1.6,
            interpolation="nearest",
        )  # fmt: skip
        for hit, marker, color in ((found, "o", "white"), (~found, "X", "#d55e00")):
            axis.plot(
                answers[hit].tolist(), rows[hit].tolist(), marker, mfc=color, mec="#333333", ms=7
            )
        axis.set_title(
            f"{name}: {100 * float(read.sum() / every.sum()):.0f} % of the tiles,\n"
            f"{int(found.sum())} of {len(found)} answers read",
            fontsize=11,
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("key block")
        axis.set_ylabel("query block")
    return figure


def fixed_patterns() -> Figure:
    """One head of every fixed pattern."""
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(FIXED)), FIXED, strict=True):
        pattern = fixed_pattern(
            name, 512, num_heads=2, base_sparsity=0.75, block_size=16, causal=True
        )
        axis.imshow(pattern.to_dense()[0, 1].numpy(), cmap="Greys", interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def main() -> int:
    """Draws everything."""
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    save(fixed_patterns(), "fixed_patterns")
    save(plots.plot_annealing(), "annealing")
    model, learning = train()
    save(learning, "learning")
    save(pipeline(model), "pipeline")
    save(beside(model), "beside")
    batch = TASK.batch(8, torch.Generator().manual_seed(3))
    save(plots.plot_kept_mass(record(model, [batch])), "kept_mass")
    return 0


if __name__ == "__main__":
    sys.exit(main())
