"""How fast the models of ``language_model.py`` train, by length of the context.

The same models, kernels and step as there, and as many bytes a step at all lengths but the longest:
4 windows of 8,192, 2 of 16,384, one of 32,768, one of 65,536. Steps are recorded as CUDA graphs and
what surrounds attention is compiled, for all alike. One process on an idle GPU measures everything,
round by round, so that the ratios compare::

    python experiments/language_model_speed.py --device cuda
    python experiments/language_model_speed.py --quick

A run is one round of one method at one length; see ``harness.py`` for the options.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

from dilated_attention_pytorch.tasks.text import validation_windows
from harness import Cell, Experiment, Runs, run, values, verdict
from language_model_training import FULL, QUICK, Training, measure
from python_sources import python_sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = (1, 2, 4, 8)
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"attention": "dense", "sparsity": 0.0},
    "adaptive defaults": {"attention": "adaptive", "sparsity": 0.9, "defaults": True},
    "adaptive 0.8": {"attention": "adaptive", "sparsity": 0.8},
    "adaptive 0.9": {"attention": "adaptive", "sparsity": 0.9},
    "adaptive 0.95": {"attention": "adaptive", "sparsity": 0.95},
    "local 0.9": {"attention": "local", "sparsity": 0.9},
    "mean-pooled 0.9": {"attention": "mean_pooled", "sparsity": 0.9},
    "FlexAttention window 0.9": {"attention": "flex_window", "sparsity": 0.9},
}
# Text that is read: enough for all steps.
BYTES = 4_000_000
CHUNKS, STEPS = 5, 6
# A budget by content has settled at its sparsity then.
WARM_UP = 80


def execute(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Times training steps of one method at one length."""
    cuda = device == "cuda"
    # Compiled code of other lengths would count against the limit of recompilations.
    torch.compiler.reset()
    settings = {**settings, "graph": cuda, "compile": cuda}
    size = (replace(QUICK, seq_len=256, num_layers=1) if quick else FULL).of(settings)
    text = python_sources(QUICK.max_bytes if quick else BYTES)
    training = Training(settings, size, text.train, seed, device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 if quick else WARM_UP):
        loss = training.step()
    loss.item()
    seconds, steps = [], 1 if quick else STEPS
    for _ in range(1 if quick else CHUNKS):
        start = time.perf_counter()
        for _ in range(steps):
            loss = training.step()
        # Reading the loss waits for the device.
        loss.item()
        seconds.append((time.perf_counter() - start) / steps)
    windows = validation_windows(text.validation, size.seq_len, 1 if quick else 8)
    return {
        "sparsity": measure(training.model, windows, device)["sparsity"],
        "tokens": size.seq_len,
        "steps_per_second": 1 / median(seconds),
        "slowest": 1 / max(seconds),
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def ratios(runs: Runs, method: str) -> dict[int, float]:
    """Steps per second relative to dense's, by length; the mean over the rounds that both have."""
    found: dict[int, float] = {}
    for factor in FACTORS:
        own, dense = (_by_round(runs, cell_name(name, factor)) for name in (method, "dense"))
        if common := sorted(own.keys() & dense.keys()):
            found[factor] = mean(own[seed] / dense[seed] for seed in common)
    return found


def _by_round(runs: Runs, cell: str) -> dict[int, float]:
    return {run["seed"]: run["steps_per_second"] for run in runs if run["cell"] == cell}


def tokens_of(runs: Runs, factor: int) -> int:
    """How long the context of that factor was."""
    return int(values(runs, cell_name("dense", factor), "tokens")[0])


def cell_name(method: str, factor: int) -> str:
    """A method at a length."""
    return f"{method}, {FULL.seq_len * factor:,} bytes"


def finding(runs: Runs) -> str:
    """Holds the ratios against 1."""
    own = ratios(runs, "adaptive defaults")
    lengths = [f"{tokens_of(runs, factor):,}" for factor in own]
    table = [f"| bytes of context | {' | '.join(lengths)} |", "|---" * (len(own) + 1) + "|"]
    for method in METHODS:
        if method != "dense":
            found = " | ".join(f"{value:.2f}" for value in ratios(runs, method).values())
            table.append(f"| {method} | {found} |")
    return verdict(min(own.values()) > 1) + (
        "training steps per second relative to dense's (cuDNN on a GPU), with the choice of "
        "blocks, the rest of the model and the optimiser:\n\n" + "\n".join(table)
    )


def plot(runs: Runs) -> Figure:
    """The ratios over the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for method in METHODS:
        if method != "dense":
            found = ratios(runs, method)
            lengths = [tokens_of(runs, factor) for factor in found]
            axis.plot(lengths, list(found.values()), "o-", ms=4, label=method)
    axis.axhline(1, color="black", lw=1, label="dense")
    axis.set_xscale("log", base=2)
    ticks = sorted({run["tokens"] for run in runs})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xlabel("bytes of context")
    axis.set_ylabel("training steps per second, relative to dense")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    "language_model_speed",
    "From 8,192 bytes of context on, a model with adaptive attention at sparsity 0.9 trains faster "
    "than the dense one, and the more so the longer the context.",
    [
        Cell(cell_name(name, factor), {**settings, "longer": factor})
        for factor in FACTORS
        for name, settings in METHODS.items()
    ],
    execute,
    {
        "steps_per_second": "steps per second",
        "slowest": "in the slowest chunk",
        "sparsity": "sparsity",
        "gigabytes": "peak memory (GB)",
    },
    finding,
    plot,
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
