"""How fast should the temperature fall?

The needle task, one layer, with the temperature annealed over different shares of the training.
See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys

from harness import Cell, Experiment, Runs, average, bars, run
from needle_cells import execute

SHARES = {"at once": 0.001, "5 %": 0.05, "25 %": 0.25, "50 %": 0.5, "100 %": 1.0}


def finding(runs: Runs) -> str:
    """Compares the shares."""
    means = {name: average(runs, name, "accuracy") for name in SHARES}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    return (
        f"Best with {best} of the training ({means[best]:.3f}), worst with {worst} "
        f"({means[worst]:.3f}), accuracy averaged over the seeds"
        + (": the speed hardly matters here." if means[best] - means[worst] < 0.02 else ".")
    )


EXPERIMENT = Experiment(
    "annealing_speed",
    "Fast annealing converges too early, slow annealing keeps patterns soft too long.",
    [Cell(name, {"run": {"annealing_share": share}}) for name, share in SHARES.items()],
    execute,
    {"accuracy": "accuracy", "recall": "recall of the block"},
    finding,
    lambda runs: bars(runs, "accuracy", "accuracy"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
