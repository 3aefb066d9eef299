"""Plots of recordings and trainings; every function returns a matplotlib Figure.

Needs matplotlib (``pip install 'dilated-attention-pytorch[viz]'``), imported when a plot is made.
Nothing is shown and no global state of matplotlib is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dilated_attention_pytorch.analysis.recording import Recording, block_texts
from dilated_attention_pytorch.analysis.statistics import (
    distance_profile,
    head_similarity,
    head_statistics,
)
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.train.trainer import SCHEDULES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MAX_LABELS = 40
# Of the axis of sparsities: less would show by how little the measured ones differ.
_LEAST_SPAN = 0.1


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _single(xlabel: str, ylabel: str, size: tuple[float, float] = (6, 3.6)) -> tuple[Figure, Any]:
    """A figure with one axis."""
    figure = _figure(*size)
    return figure, figure.subplots(subplot_kw={"xlabel": xlabel, "ylabel": ylabel})


def _panels(
    count: int, columns: int, width: float, height: float, legend: float = 0
) -> tuple[Figure, list[Any]]:
    """A figure, with room for a legend beside the panels, and its axes."""
    rows = math.ceil(count / columns)
    figure = _figure(width * columns + legend, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def _layer_panels(recording: Recording, size: float) -> tuple[Figure, list[Any]]:
    """A panel for every layer, with its name."""
    names = recording.layer_names
    columns = math.ceil(len(names) / math.ceil(len(names) / 4))
    figure, axes = _panels(len(names), columns, size, size)
    for name, axis in zip(names, axes, strict=True):
        axis.set_title(name, fontsize=9)
    return figure, axes


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
    figure, axis = _single("key block", "query block", (7, 6.2))
    axis.set_facecolor("#eceff2")
    image = axis.imshow(shown.numpy(), cmap="viridis", interpolation="nearest", vmin=0)
    if record.mass is not None:
        figure.colorbar(image, ax=axis, label="share of the row's dense attention")
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
    figure, axes = _layer_panels(recording, 4.0)
    for number, axis in enumerate(axes):
        for head, profile in enumerate(distance_profile(recording.layer(number))):
            axis.plot(profile.numpy(), label=f"head {head}", linewidth=1.2)
        axis.set(ylim=(0, 1.02), xlabel="distance in blocks", ylabel="share of the tiles read")
        if len(axis.lines) <= 8:
            axis.legend(fontsize=7)
    return figure


def plot_head_similarity(recording: Recording, *, layer: int = 0) -> Figure:
    """Jaccard similarity of the chosen tiles between the heads of one layer, mean over samples."""
    records = recording.layer(layer)
    matrix = torch.stack([head_similarity(record.chosen()) for record in records]).mean(0)
    figure, axis = _single("head", "head", (5, 4.2))
    image = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axis, label="Jaccard similarity")
    if len(matrix) <= _MAX_LABELS:
        axis.set_xticks(range(len(matrix)))
        axis.set_yticks(range(len(matrix)))
    axis.set_title(recording.layer_names[layer])
    return figure


def plot_sparsity_by_layer(recording: Recording) -> Figure:
    """The sparsity of every head (dots) and the mean of every layer (line)."""
    statistics = head_statistics(recording)
    figure, axis = _single("layer", "sparsity")
    for number, heads in enumerate(statistics):
        axis.plot([number] * len(heads), [h.sparsity for h in heads], "o", color="#0072b2", ms=4)
    means = [sum(h.sparsity for h in heads) / len(heads) for heads in statistics]
    axis.plot(means, color="#d55e00", label="mean")
    axis.set_xticks(range(len(statistics)))
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
    figure, axis = _single("step", field.replace("_", " "))
    if by_layer:
        for number, values in enumerate(zip(*(line[field] for line in lines), strict=True)):
            axis.plot(steps, values, label=f"layer {number}")
        axis.legend(fontsize=8)
    else:
        axis.plot(steps, [line[field] for line in lines])
    return figure


def plot_annealing(
    initial_temperature: float = 1.0, final_temperature: float = 0.1, annealing_steps: int = 1000
) -> Figure:
    """The temperature under every schedule of :class:`AdaptiveSparsityTrainer`."""
    figure, axis = _single("step", "temperature")
    steps = range(annealing_steps + 1)
    for name, move in SCHEDULES.items():
        values = [
            move(initial_temperature, final_temperature, step / annealing_steps) for step in steps
        ]
        axis.plot(steps, values, label=name)
    axis.legend()
    return figure


def plot_kept_mass(recording: Recording) -> Figure:
    """Selected against true attention: what every row kept, and what it could have kept.

    One panel per layer; a point per row, head and sample. On the diagonal no other choice of as
    many tiles would have held more.

    Raises:
        ValueError: If the recording did not measure the attention.
    """
    figure, axes = _layer_panels(recording, 3.6)
    for number, axis in enumerate(axes):
        for record in recording.layer(number):
            if record.mass is None or record.best_mass is None:
                raise ValueError("the recording holds no attention; record with measure_mass=True.")
            kept = record.mass.masked_fill(~record.pattern.slot_used()[0], 0).sum(-1)
            axis.plot(
                record.best_mass.flatten().numpy(), kept.flatten().numpy(), ".", ms=2, alpha=0.4,
                color="#0072b2",
            )  # fmt: skip
        axis.plot([0, 1], [0, 1], color="#666666", linewidth=0.8)
        axis.set(xlabel="best choice of as many tiles", ylabel="attention kept")
    return figure


def plot_perplexity(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity in percent above dense by sparsity, one panel per text, length and block size.

    Linear up to one percent, logarithmic beyond: at high sparsities everybody loses much. Who
    misses the sparsity asked for has its point where it is, not where it should be.

    Args:
        rows: Of an evaluation: ``text``, ``length``, ``block_size``, ``method``,
            ``measured_sparsity``, ``ratio``.
    """
    panels = sorted({(row["text"], row["length"], row["block_size"]) for row in rows})
    figure, axes = _panels(len(panels), min(len(panels), 3), 4, 3.4, legend=2.2)
    # One colour for a method, one line style for a budget; the oracle in black.
    styles = {"": "-", "threshold": "--", "allotted": "-."}
    plain = dict.fromkeys(_name(row["method"]) for row in rows)
    colours = {name: f"C{number}" for number, name in enumerate(plain)} | {"oracle": "black"}
    methods = sorted(
        {row["method"] for row in rows}, key=lambda m: (list(plain).index(_name(m)), m)
    )
    lines_by_method: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        text, length, block_size = panel
        for method in methods:
            points = sorted(
                (row["measured_sparsity"], 100 * (row["ratio"] - 1))
                for row in rows
                if row["method"] == method
                and (row["text"], row["length"], row["block_size"]) == panel
            )
            if points:
                name, rule = _name(method), method.partition(":")[2]
                (lines_by_method[method],) = axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, label=method,
                    color=colours[name], linestyle=styles.get(rule, ":"),
                    linewidth=2.5 if method == "adapter" else 1.2,
                )  # fmt: skip
        axis.axhline(0.0, color="grey", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=1, linscale=0.5, subs=(2, 5))
        axis.set_ylim(bottom=min(min(line.get_ydata()) for line in axis.get_lines()) - 0.2)
        for shown in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            shown("{x:g}")
        left, right = axis.get_xlim()
        if right - left < _LEAST_SPAN:
            middle = (left + right) / 2
            axis.set_xlim(middle - _LEAST_SPAN / 2, middle + _LEAST_SPAN / 2)
        axis.set_title(
            f"{printable(text)}: {length:,} tokens, blocks of {block_size}", fontsize=9,
            # The name of a file is no formula.
            parse_math=False,
        )  # fmt: skip
        axis.set(xlabel="measured sparsity", ylabel="perplexity above dense, %")
    if lines_by_method:
        shown = [method for method in methods if method in lines_by_method]
        handles = [lines_by_method[method] for method in shown]
        figure.legend(handles, shown, fontsize=8, loc="outside right upper")
    return figure


def _name(method: str) -> str:
    """A method without its budget."""
    return method.partition(":")[0]
