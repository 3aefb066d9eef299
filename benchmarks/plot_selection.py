"""Draws ``results/selection.json`` as ``results/selection.png`` and ``results/selection.md``.

python benchmarks/plot_selection.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
STAGES = ("summaries", "candidates", "scores", "budget", "choose", "transpose")
# Of the layer to dense attention.
RATIOS = (
    "times faster, forward", "times faster, step", "share of ideal, forward",
    "share of ideal, step",
)  # fmt: skip


def median(row: dict[str, Any], name: str) -> float | None:
    """The median milliseconds of a call, if it was measured."""
    found = row["times"].get(name, {}).get("median")
    return None if found is None else float(found)


def write_table(record: dict[str, Any], path: Path) -> None:
    """Writes every length's times in milliseconds as Markdown."""
    names = [*STAGES, "selection", "attention forward", "layer forward", "selection step",
             "attention step", "layer step"]  # fmt: skip
    head = ["tokens", "candidates", "sparsity", *names, "dense forward", "dense step",
            *RATIOS]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row, line in zip(record["lengths"], record["conclusions"]["rows"], strict=True):
        cells = [f"{row['tokens']:,}", "linear" if row["linear"] else "all"]
        cells.append(f"{1 - row['kept']:.3f}")
        cells += ["" if (x := median(row, name)) is None else f"{x:.3f}" for name in names]
        for key in ("dense forward ms", "dense step ms"):
            mark = "" if row["tokens"] <= record["conclusions"]["dense_extrapolated_from"] else "*"
            cells.append(f"{line[key]:.2f}{mark}")
        for key in RATIOS:
            cells.append(f"{line[key]:.2f}" if key in line else "")
        lines.append("| " + " | ".join(cells) + " |")
    about, found = record["environment"], record["conclusions"]
    even = [f"{found[f'break-even {part}, tokens']:,}" for part in ("forward", "step")]
    longest = record["conclusions"]["dense_extrapolated_from"]
    lines += [
        "",
        f"Milliseconds, median. 16 heads of 128, bfloat16, block 64, not causal; "
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}. "
        f"* extrapolated from {longest:,} tokens with the square of the length. "
        f"The layer overtakes dense from {even[0]} tokens on forward, from {even[1]} in a step. "
        "Share of the ideal: dense time x share of the tiles kept / the layer's time.",
        "",
    ]
    path.write_text("\n".join(lines))


def main() -> int:
    """Draws stages against length, and the layer against dense attention."""
    from matplotlib.figure import Figure

    record = json.loads((RESULTS / "selection.json").read_text())
    write_table(record, RESULTS / "selection.md")
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)

    def draw(axis: Any, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
        points = [(row["tokens"], x) for row in rows if (x := median(row, name)) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)

    for axis, linear in zip(axes, (False, True), strict=False):
        rows = [row for row in record["lengths"] if row["linear"] == linear]
        for name in (*STAGES, "attention forward"):
            style = "--" if name == "attention forward" else "-"
            draw(axis, rows, name, label=name, linestyle=style)
        axis.set_title("linear candidates" if linear else "all blocks are candidates")
    pairs = zip(record["lengths"], record["conclusions"]["rows"], strict=True)
    every = [(row, line) for row, line in pairs if not row["linear"]]
    for part, color in (("forward", "#0072b2"), ("step", "#d55e00")):
        draw(axes[2], [row for row, _ in every], f"layer {part}", color=color,
             label=f"layer {part}")  # fmt: skip
        tokens = [row["tokens"] for row, _ in every]
        dense = [line[f"dense {part} ms"] for _, line in every]
        ideal = [x * row["kept"] for x, (row, _) in zip(dense, every, strict=True)]
        axes[2].plot(tokens, dense, color=color, linestyle="--", label=f"dense {part}, cuDNN")
        axes[2].plot(tokens, ideal, color=color, linestyle=":", label="dense x share kept")
    axes[2].set_title("selection + attention against dense")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    about = record["environment"]
    figure.suptitle(
        f"Block 64, 16 heads of 128, bfloat16; {about['device']}, torch {about['torch']}, "
        f"commit {about['commit']}"
    )
    figure.savefig(RESULTS / "selection.png", dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
