"""Plots of distillations and evaluations; each returns a Figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dilated_attention_pytorch.foreign_text import printable

# What is drawn of a level of sparsity, and how its name reads.
_DRAWN = ("recall", "kept_mass", "best_mass")
_RECALL = re.compile(r"recall_\d+(\.\d+)?")


def plot_recall(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Recall of the true top blocks and kept mass by step, one line per sparsity.

    Args:
        metrics: Lines of a distillation's metrics file.
    """
    # By level: a line that lacks one of the three is left out.
    levels: dict[str, list[Mapping[str, Any]]] = {}
    for line in metrics:
        for level in (x.removeprefix("recall_") for x in line if _RECALL.fullmatch(x)):
            if all(isinstance(line.get(f"{x}_{level}"), int | float) for x in _DRAWN):
                levels.setdefault(level, []).append(line)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for number, (sparsity, measured) in enumerate(sorted(levels.items(), key=_as_number)):
        colour, steps = f"C{number}", [line["step"] for line in measured]
        recall = [line[f"recall_{sparsity}"] for line in measured]
        kept = [line[f"kept_mass_{sparsity}"] for line in measured]
        best = [line[f"best_mass_{sparsity}"] for line in measured]
        left.plot(steps, recall, color=colour, label=f"sparsity {sparsity}")
        right.plot(steps, kept, color=colour, label=f"sparsity {sparsity}")
        right.plot(steps, best, color=colour, linestyle=":")
    left.set(xlabel="step", ylabel="recall of the true top blocks")
    right.set(xlabel="step", ylabel="kept attention mass (dotted: best choice)")
    if levels:
        left.legend()
    return figure


def _as_number(item: tuple[str, Any]) -> float:
    return float(item[0])


# Of the axis of sparsities: less would show by how little the measured ones differ.
_LEAST_SPAN = 0.1


def plot_perplexity(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity in percent above dense by sparsity, one panel per text, length and block size.

    Linear up to one percent, logarithmic beyond: at high sparsities everybody loses much. Who
    misses the sparsity asked for has its point where it is, not where it should be.

    Args:
        rows: Of an evaluation: ``text``, ``length``, ``block_size``, ``method``,
            ``measured_sparsity``, ``ratio``.
    """
    panels = sorted({(row["text"], row["length"], row["block_size"]) for row in rows})
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    # The legend stands beside the panels.
    figure = Figure(figsize=(4 * columns + 2.2, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    # One colour for a method, one line style for a budget; the oracle in black.
    styles = {"": "-", "threshold": "--", "allotted": "-."}
    plain = dict.fromkeys(_name(row["method"]) for row in rows)
    colours = {name: f"C{number}" for number, name in enumerate(plain)} | {"oracle": "black"}
    methods = sorted(
        {row["method"] for row in rows}, key=lambda m: (list(plain).index(_name(m)), m)
    )
    lines_by_method: dict[str, Any] = {}
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
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
