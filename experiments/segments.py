"""Choosing inside a multi-scale structure.

The needle task, one layer: candidates limited to dilated segments of several lengths (fine nearby,
coarse far), against all earlier blocks. See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from dilated_attention_pytorch import BlockSparseFixed
from dilated_attention_pytorch.tasks.needle import NeedleTask
from harness import Cell, Experiment, Runs, average, bars, run, spread, verdict
from needle_cells import train_cell

SEGMENTS: dict[str, dict[str, Any]] = {
    "all earlier blocks": {},
    "128 tokens": {"segment_lengths": (128,), "dilation_rates": (1,)},
    "128 and 512 / 2": {"segment_lengths": (128, 512), "dilation_rates": (1, 2)},
    "128, 256 / 2, 512 / 4": {"segment_lengths": (128, 256, 512), "dilation_rates": (1, 2, 4)},
}


def ceiling(settings: Mapping[str, Any]) -> float:
    """The accuracy of a model that reads every candidate and guesses the rest.

    An answer can be fetched if its block is a candidate of some head.
    """
    task = NeedleTask()
    layer = BlockSparseFixed(
        "local", 2, 1, base_sparsity=0.0, block_size=task.block_size, **settings.get("run", {})
    )
    x = torch.zeros(1, task.seq_len, 2, 1)
    _, info = layer(x, x, x, is_causal=True, return_pattern=True)
    earlier = info["pattern"].to_dense()[0].any(0).tril(-1)
    # The block of an answer is any earlier one with equal probability; row 0 is not asked.
    places = torch.arange(1, len(earlier))
    reachable = float((earlier.sum(-1)[1:] / places).mean())
    return reachable + (1 - reachable) / task.num_values


def execute(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Trains one cell."""
    return {**train_cell(settings, seed, quick, device)[2], "ceiling": ceiling(settings)}


def finding(runs: Runs) -> str:
    """Whether selection finds what each structure lets it find."""
    names = list(SEGMENTS)
    margin = max(0.05, spread(runs, names, "accuracy"))
    pairs = {n: (average(runs, n, "accuracy"), average(runs, n, "ceiling")) for n in names}
    behind = max(most - found for found, most in pairs.values())
    return verdict(behind < margin) + (
        f"whatever may be chosen (segments in tokens / dilation), the accuracy is at most "
        f"{max(behind, 0):.3f} below what reading all of it would give."
    )


EXPERIMENT = Experiment(
    "segments",
    "Adaptive selection works inside a hierarchical structure: fine nearby, coarse far away.",
    [Cell(name, {"run": settings}) for name, settings in SEGMENTS.items()],
    execute,
    {
        "accuracy": "accuracy",
        "ceiling": "accuracy if all candidates were read",
        "recall": "recall of the block",
        "sparsity": "sparsity",
    },
    finding,
    lambda runs: bars(runs, "accuracy", "accuracy"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
