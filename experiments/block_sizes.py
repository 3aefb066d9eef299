"""How fine should blocks be?

The needle task (its own blocks have 16 tokens), one layer, at one sparsity with blocks of 8 to 64
tokens. See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys

from harness import Cell, Experiment, Runs, average, bars, run
from needle_cells import execute

SIZES = (8, 16, 32, 64)
SPARSITY = 0.75


def finding(runs: Runs) -> str:
    """Lists the sizes."""
    numbers = [
        f"{size} tokens {average(runs, str(size), 'accuracy'):.3f} (sparsity "
        f"{average(runs, str(size), 'sparsity'):.2f})"
        for size in SIZES
    ]
    return "Accuracy by block size: " + ", ".join(numbers) + "."


EXPERIMENT = Experiment(
    "block_sizes",
    "Smaller blocks choose more finely; larger ones suit the hardware.",
    [Cell(str(n), {"config": {"block_size": n, "base_sparsity": SPARSITY}}) for n in SIZES],
    execute,
    {"accuracy": "accuracy", "sparsity": "sparsity"},
    finding,
    lambda runs: bars(runs, "accuracy", "accuracy"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
