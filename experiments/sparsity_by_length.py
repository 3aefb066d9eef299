"""Can longer sequences leave out more?

The needle task, one layer, at several lengths, with one sparsity for all and with the sparsity that
``get_adaptive_sparsity`` gives. See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys

from dilated_attention_pytorch import get_adaptive_sparsity
from harness import Cell, Experiment, Runs, average, bars, run, spread, values, verdict
from needle_cells import execute

LENGTHS = (512, 1024, 2048, 4096)
# Below, a seed did not find the task's rule.
LEARNED = 0.9
RULES = {"0.8 everywhere": lambda length: 0.8, "by length": get_adaptive_sparsity}


def finding(runs: Runs) -> str:
    """Whether the sparser rule costs accuracy at the longest length that the denser one learns.

    Where some seeds do not learn at all, how far they differ would hide any loss.
    """
    same, by_length = RULES
    learned = [n for n in LENGTHS if min(values(runs, f"{n} tokens, {same}", "accuracy")) > LEARNED]
    if not learned:
        return f"{verdict(False)}nothing to compare: some seed fails at every length."
    cells = [f"{learned[-1]} tokens, {rule}" for rule in (same, by_length)]
    margin = max(0.01, spread(runs, cells, "accuracy"))
    loss = average(runs, cells[0], "accuracy") - average(runs, cells[1], "accuracy")
    place = f"at {learned[-1]:,} tokens, the longest that all seeds learn at 0.8, the sparser rule "
    words = f"{verdict(loss <= margin)}{place}loses {loss:.3f}."
    if learned[-1] < LENGTHS[-1]:
        words += " Beyond it some seeds learn nothing."
    return words


def settings(length: int, rule: str) -> dict[str, object]:
    """Keys enough for every block, and as many tokens per step at every length."""
    return {
        "task": {"seq_len": length, "num_keys": length // 4},
        "config": {"base_sparsity": RULES[rule](length)},
        "run": {"batch_size": max(1, 64 * 512 // length)},
    }


EXPERIMENT = Experiment(
    "sparsity_by_length",
    "Longer sequences need a smaller share of their connections.",
    [Cell(f"{n} tokens, {rule}", settings(n, rule)) for n in LENGTHS for rule in RULES],
    execute,
    {"accuracy": "accuracy", "sparsity": "sparsity"},
    finding,
    lambda runs: bars(runs, "accuracy", "accuracy"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
