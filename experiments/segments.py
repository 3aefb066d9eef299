"""Choosing inside a multi-scale structure.

The needle task, one layer: candidates limited to dilated segments of several lengths (fine nearby,
coarse far), against all earlier blocks. See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys

from harness import Cell, Experiment, Runs, average, bars, run
from needle_cells import execute

SEGMENTS = {
    "all earlier blocks": {},
    "128 tokens": {"segment_lengths": (128,), "dilation_rates": (1,)},
    "128 and 512 / 2": {"segment_lengths": (128, 512), "dilation_rates": (1, 2)},
    "128, 256 / 2, 512 / 4": {"segment_lengths": (128, 256, 512), "dilation_rates": (1, 2, 4)},
}


def finding(runs: Runs) -> str:
    """Lists the structures."""
    numbers = [f"{name} {average(runs, name, 'accuracy'):.3f}" for name in SEGMENTS]
    return "Accuracy by what may be chosen (tokens / dilation): " + ", ".join(numbers) + "."


EXPERIMENT = Experiment(
    "segments",
    "Adaptive selection works inside a hierarchical structure: fine nearby, coarse far away.",
    [Cell(name, {"run": settings}) for name, settings in SEGMENTS.items()],
    execute,
    {"accuracy": "accuracy", "recall": "recall of the block", "sparsity": "sparsity"},
    finding,
    lambda runs: bars(runs, "accuracy", "accuracy"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
