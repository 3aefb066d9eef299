"""How fine should blocks be?

The needle task (its own blocks have 16 tokens), one layer, at one sparsity with blocks of 8 to 64
tokens. See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys
from itertools import pairwise

from harness import Cell, Experiment, Runs, average, bars, run, spread, verdict
from needle_cells import execute

SIZES = (8, 16, 32, 64)
SPARSITY = 0.75


def finding(runs: Runs) -> str:
    """Whether accuracy falls with the size; speed is not measured here."""
    names = [str(size) for size in SIZES]
    means = [average(runs, name, "accuracy") for name in names]
    margin = max(0.01, spread(runs, names, "accuracy"))
    never_rises = all(b <= a + margin for a, b in pairwise(means))
    return verdict(never_rises and means[-1] < means[0] - margin) + (
        f"at one sparsity blocks of {names[0]} tokens answer {means[0]:.3f} of the questions, "
        f"blocks of {names[-1]} {means[-1]:.3f}. Speed is what the benchmarks measure."
    )


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
