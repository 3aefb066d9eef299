"""How fast should the temperature fall?

The needle task, one layer, with the temperature annealed over different shares of the training.
See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys

from harness import Cell, Experiment, Runs, average, bars, run, spread, verdict
from needle_cells import execute

SHARES = {"at once": 0.001, "5 %": 0.05, "25 %": 0.25, "50 %": 0.5, "100 %": 1.0}


def finding(runs: Runs) -> str:
    """Compares the ends with the best."""
    means = {name: average(runs, name, "accuracy") for name in SHARES}
    margin = max(0.01, spread(runs, list(SHARES), "accuracy"))
    best, (first, *_, last) = max(means.values()), SHARES
    holds = max(means[first], means[last]) < best - margin
    if best - min(means.values()) <= margin:
        return verdict(holds) + "the speed makes no difference at the end."
    return verdict(holds) + (
        f"a fall at once ends with an accuracy of {means[first]:.3f}, one over the whole training "
        f"with {means[last]:.3f}, the best with {best:.3f}."
    )


EXPERIMENT = Experiment(
    "annealing_speed",
    "Fast annealing converges too early, slow annealing keeps patterns soft too long.",
    [Cell(name, {"run": {"annealing_share": share}}) for name, share in SHARES.items()],
    execute,
    {
        "accuracy": "accuracy",
        "recall": "recall of the block",
        "steps_to_90": "steps to an accuracy of 0.9",
    },
    finding,
    lambda runs: bars(runs, "accuracy", "accuracy"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
