"""Adaptive against every fixed pattern, where the place of the answer varies and where it does not.

The needle task, one layer, all at one sparsity: with the answer in any earlier block (varied) and
always in the block before (uniform). See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys

from harness import Cell, Experiment, Runs, average, bars, run, spread, verdict
from needle_cells import execute

METHODS = ("adaptive", "local", "dilated", "strided", "hierarchical", "sink_local", "random")
TARGETS = {"varied": "anywhere", "uniform": "previous"}


def finding(runs: Runs) -> str:
    """Compares adaptive attention with the best fixed pattern on both."""
    words, gains, margins = [], {}, {}
    for kind in TARGETS:
        means = {m: average(runs, f"{kind}, {m}", "accuracy") for m in METHODS}
        best = max(METHODS[1:], key=means.__getitem__)
        pair = [f"{kind}, {method}" for method in ("adaptive", best)]
        gains[kind] = means["adaptive"] - means[best]
        margins[kind] = max(0.01, spread(runs, pair, "accuracy"))
        words.append(
            f"on {kind} input adaptive has {means['adaptive']:.3f}, the best fixed pattern "
            f"({best}) {means[best]:.3f}"
        )
    holds = gains["varied"] > margins["varied"] and gains["uniform"] > -margins["uniform"]
    return verdict(holds) + "; ".join(words) + "."


EXPERIMENT = Experiment(
    "varied_and_uniform",
    "Adaptive attention excels on varied input and matches fixed patterns on uniform input.",
    [
        Cell(f"{kind}, {method}", {"task": {"target": target}, "attention": method})
        for kind, target in TARGETS.items()
        for method in METHODS
    ],
    execute,
    {"accuracy": "accuracy", "sparsity": "sparsity"},
    finding,
    lambda runs: bars(runs, "accuracy", "accuracy"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
