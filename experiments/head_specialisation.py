"""Do heads specialise?

The needle task with four heads, one layer, where questions of three kinds are mixed: the answer
lies in the block before, four blocks back, or anywhere. Beside the accuracy: what kind of head each
one became (``analysis.HEAD_KINDS``), and how alike the heads are. See ``harness.py``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from dilated_attention_pytorch.analysis import head_statistics, record
from harness import Cell, Experiment, Runs, average, bars, run, values, verdict
from needle_cells import train_cell

TARGETS = ("mixed", "previous", "periodic", "anywhere")


def execute(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Trains and looks at the heads."""
    needle_run, model, result = train_cell(settings, seed, quick, device)
    batch = needle_run.task.batch(16, torch.Generator().manual_seed(9)).to(torch.device(device))
    (heads,) = head_statistics(record(model, [batch], max_samples=16))
    kinds = Counter(head.kind for head in heads)
    return {
        **result,
        "kinds": ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        "diversity": sum(head.diversity for head in heads) / len(heads),
        "similarity": sum(head.similarity for head in heads) / len(heads),
    }


def finding(runs: Runs) -> str:
    """Heads specialise if most models with mixed questions have heads of several kinds."""
    kinds = values(runs, "mixed", "kinds")
    several = sum("," in found for found in kinds)
    return verdict(2 * several > len(kinds)) + (
        f"with mixed questions {several} of {len(kinds)} models have heads of several kinds. Two "
        f"heads share {average(runs, 'mixed', 'similarity'):.2f} of their blocks."
    )


EXPERIMENT = Experiment(
    "head_specialisation",
    "Different heads learn different kinds of patterns: local, long-range, periodic.",
    [Cell(target, {"task": {"target": target}, "run": {"num_heads": 4}}) for target in TARGETS],
    execute,
    {
        "accuracy": "accuracy",
        "diversity": "diversity",
        "similarity": "likeness of heads",
        "kinds": "kinds of heads",
    },
    finding,
    lambda runs: bars(runs, "similarity", "likeness of the heads (Jaccard)"),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
