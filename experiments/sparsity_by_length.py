"""Can longer sequences leave out more?

The needle task, one layer, at several lengths, with one sparsity for all and with the sparsity that
``get_adaptive_sparsity`` gives. See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys

from dilated_attention_pytorch import get_adaptive_sparsity
from harness import Cell, Experiment, Runs, average, bars, run
from needle_cells import execute

LENGTHS = (512, 1024, 2048, 4096)
RULES = {"0.8 everywhere": lambda length: 0.8, "by length": get_adaptive_sparsity}


def finding(runs: Runs) -> str:
    """Lists both rules by length."""
    sentences = [
        f"{rule}: "
        + ", ".join(f"{average(runs, f'{n} tokens, {rule}', 'accuracy'):.3f}" for n in LENGTHS)
        for rule in RULES
    ]
    lengths = ", ".join(f"{n:,}" for n in LENGTHS)
    return f"Accuracy at {lengths} tokens, {'; '.join(sentences)}."


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
