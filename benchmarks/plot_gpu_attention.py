"""Draws ``results/gpu_attention.json`` as ``results/gpu_attention.png``.

python benchmarks/plot_gpu_attention.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CONTENDERS = (
    "ours",
    "FlexAttention, block 128",
    "FlashAttention-4, block 128",
    "dense cuDNN",
    "dense FlashAttention-4",
)


def main() -> int:
    """Draws step time against sparsity and against length, with the ideal."""
    from matplotlib.figure import Figure

    record = json.loads((RESULTS / "gpu_attention.json").read_text())
    base = record["bars"]["block 64"]
    everything = [base, *record["sweep"].values()]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)

    def draw(axis: Any, field: str, rows: list[dict[str, Any]]) -> None:
        rows = sorted(rows, key=lambda row: row["setup"][field])
        places = [row["setup"][field] for row in rows]
        for name in CONTENDERS:
            # FlashAttention-4 takes part where its package is installed.
            if all(name in row["results"] for row in rows):
                steps = [row["results"][name]["step"]["median"] for row in rows]
                axis.plot(places, steps, marker="o", label=name)
        ideal = [
            min(
                parts["step"]["median"]
                for name, parts in row["results"].items()
                if name.startswith("dense")
            )
            * (1 - row["setup"]["sparsity"])
            for row in rows
        ]
        axis.plot(places, ideal, "k:", label="best dense x fraction kept")
        axis.set(yscale="log", xlabel=field, ylabel="forward + backward, ms")
        axis.grid(alpha=0.3)

    length, sparsity = base["setup"]["tokens"], base["setup"]["sparsity"]
    draw(axes[0], "sparsity", [x for x in everything if x["setup"]["tokens"] == length])
    draw(axes[1], "tokens", [x for x in everything if x["setup"]["sparsity"] == sparsity])
    axes[0].set_title(f"{length:,} tokens")
    axes[1].set_title(f"sparsity {sparsity}")
    axes[1].set_xscale("log", base=2)
    axes[0].legend(fontsize=8)
    about = record["environment"]
    figure.suptitle(
        f"Block 64, 16 heads of 128, bfloat16; {about['device']}, torch {about['torch']}, "
        f"commit {about['commit']}"
    )
    figure.savefig(RESULTS / "gpu_attention.png", dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
