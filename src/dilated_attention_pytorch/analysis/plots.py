"""Plots of recordings and trainings; every function returns a matplotlib Figure.

Needs matplotlib (``pip install 'dilated-attention-pytorch[viz]'``), imported when a plot is made.
Nothing is shown and no global state of matplotlib is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dilated_attention_pytorch.analysis.head_statistics import (
    distance_profile,
    head_similarity,
    head_statistics,
)
from dilated_attention_pytorch.analysis.recording import Recording, block_texts
from dilated_attention_pytorch.train.trainer import SCHEDULES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_LABELS = 40


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(count: int, size: float, *, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A row (or more) of equal axes."""
    columns = math.ceil(count / rows)
    figure = _figure(size * columns, size * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def plot_block_map(
    recording: Recording, *, sample: int = 0, layer: int = 0, head: int = 0
) -> Figure:
    """The tiles that one head reads, coloured by their share of the attention.

    Args:
        recording: What to draw; its tokens label the axes if there are few blocks.
        sample: Number of the sample.
        layer: Number of the layer.
        head: Number of the head.
    """
    record = recording.samples[sample].layers[layer]
    pattern = record.pattern
    kept = record.kept()[head]
    values = kept.float() if record.mass is None else record.spread(record.mass)[head]
    shown = values.masked_fill(~kept, torch.nan)
    figure = _figure(7, 6.2)
    axis = figure.subplots()
    axis.set_facecolor("#eceff2")
    image = axis.imshow(shown.numpy(), cmap="viridis", interpolation="nearest", vmin=0)
    if record.mass is not None:
        figure.colorbar(image, ax=axis, label="share of the row's dense attention")
    axis.set_xlabel("key block")
    axis.set_ylabel("query block")
    axis.set_title(f"{record.name}, head {head}: sparsity {pattern.sparsity_per_head[0, head]:.2f}")
    tokens = recording.samples[sample].tokens
    if tokens is not None and pattern.num_query_blocks <= _MAX_LABELS:
        texts = block_texts(tokens, pattern.block_size[1])
        labels = [_brief(text) for text in texts]
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6, family="monospace")
        if pattern.num_query_blocks == pattern.num_key_blocks:
            axis.set_yticks(range(len(labels)), labels, fontsize=6, family="monospace")
    return figure


def _brief(text: str) -> str:
    # matplotlib would read a pair of dollar signs as a formula.
    return " ".join(text.split())[:16].replace("$", r"\$")


def plot_distance_profiles(recording: Recording) -> Figure:
    """How much of each distance the heads read: one panel per layer, one line per head."""
    layers = range(len(recording.layer_names))
    figure, axes = _grid(len(layers), 4.0, rows=math.ceil(len(layers) / 4))
    for number, axis in zip(layers, axes, strict=True):
        for head, profile in enumerate(distance_profile(recording.layer(number))):
            axis.plot(profile.numpy(), label=f"head {head}", linewidth=1.2)
        axis.set_ylim(0, 1.02)
        axis.set_title(recording.layer_names[number], fontsize=9)
        axis.set_xlabel("distance in blocks")
        axis.set_ylabel("share of the tiles read")
        if len(axis.lines) <= 8:
            axis.legend(fontsize=7)
    return figure


def plot_head_similarity(recording: Recording, *, layer: int = 0) -> Figure:
    """Jaccard similarity of the chosen tiles between the heads of one layer, mean over samples."""
    records = recording.layer(layer)
    matrix = torch.stack([head_similarity(record.chosen()) for record in records]).mean(0)
    figure = _figure(5, 4.2)
    axis = figure.subplots()
    image = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axis, label="Jaccard similarity")
    if len(matrix) <= _MAX_LABELS:
        axis.set_xticks(range(len(matrix)))
        axis.set_yticks(range(len(matrix)))
    axis.set_xlabel("head")
    axis.set_ylabel("head")
    axis.set_title(recording.layer_names[layer])
    return figure


def plot_sparsity_by_layer(recording: Recording) -> Figure:
    """The sparsity of every head (dots) and the mean of every layer (line)."""
    statistics = head_statistics(recording)
    figure = _figure(6, 3.6)
    axis = figure.subplots()
    for number, heads in enumerate(statistics):
        axis.plot([number] * len(heads), [h.sparsity for h in heads], "o", color="#0072b2", ms=4)
    means = [sum(h.sparsity for h in heads) / len(heads) for heads in statistics]
    axis.plot(means, color="#d55e00", label="mean")
    axis.set_xticks(range(len(statistics)))
    axis.set_xlabel("layer")
    axis.set_ylabel("sparsity")
    axis.legend()
    return figure


def plot_training(history: Sequence[Mapping[str, Any]], field: str = "layer_sparsity") -> Figure:
    """One metric over the training.

    Args:
        history: Lines of metrics with ``"step"``.
        field: ``"layer_sparsity"`` (a line per layer), ``"loss"``, ``"temperature"``,
            ``"sparsity"``, or another number of the metrics.

    Raises:
        ValueError: If no line has the field.
    """
    lines = [line for line in history if line.get(field) is not None]
    if not lines:
        raise ValueError(f"no line of history has a {field!r}.")
    by_layer = isinstance(lines[-1][field], Sequence)
    if by_layer:
        # All of them speak of as many layers as the last one.
        layers = len(lines[-1][field])
        lines = [x for x in lines if isinstance(x[field], Sequence) and len(x[field]) == layers]
    steps = [line["step"] for line in lines]
    figure = _figure(6, 3.6)
    axis = figure.subplots()
    if by_layer:
        for number, values in enumerate(zip(*(line[field] for line in lines), strict=True)):
            axis.plot(steps, values, label=f"layer {number}")
        axis.legend(fontsize=8)
    else:
        axis.plot(steps, [line[field] for line in lines])
    axis.set_xlabel("step")
    axis.set_ylabel(field.replace("_", " "))
    return figure


def plot_annealing(
    initial_temperature: float = 1.0, final_temperature: float = 0.1, annealing_steps: int = 1000
) -> Figure:
    """The temperature under every schedule of :class:`AdaptiveSparsityTrainer`."""
    figure = _figure(6, 3.6)
    axis = figure.subplots()
    steps = range(annealing_steps + 1)
    for name, move in SCHEDULES.items():
        values = [
            move(initial_temperature, final_temperature, step / annealing_steps) for step in steps
        ]
        axis.plot(steps, values, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("temperature")
    axis.legend()
    return figure


def plot_kept_mass(recording: Recording) -> Figure:
    """Selected against true attention: what every row kept, and what it could have kept.

    One panel per layer; a point per row, head and sample. On the diagonal no other choice of as
    many tiles would have held more.

    Raises:
        ValueError: If the recording did not measure the attention.
    """
    layers = range(len(recording.layer_names))
    figure, axes = _grid(len(layers), 3.6, rows=math.ceil(len(layers) / 4))
    for number, axis in zip(layers, axes, strict=True):
        for record in recording.layer(number):
            if record.mass is None or record.best_mass is None:
                raise ValueError("the recording holds no attention; record with measure_mass=True.")
            kept = record.mass.masked_fill(~record.pattern.slot_used()[0], 0).sum(-1)
            axis.plot(
                record.best_mass.flatten().numpy(), kept.flatten().numpy(), ".", ms=2, alpha=0.4,
                color="#0072b2",
            )  # fmt: skip
        axis.plot([0, 1], [0, 1], color="#666666", linewidth=0.8)
        axis.set_xlabel("best choice of as many tiles")
        axis.set_ylabel("attention kept")
        axis.set_title(recording.layer_names[number], fontsize=9)
    return figure
