"""Runs several experiments at once: their runs share the processes, none waits for the last one.

    python experiments/run_all.py --device cuda --jobs 12 --minutes 8
    python experiments/run_all.py --device cuda --jobs 24 --gpus 2 --only segments block_sizes
    python experiments/run_all.py --quick --jobs 2

The first seed of everything comes first. The language models, whose speed is measured, have the
GPUs to themselves and are not among them. See ``harness.py`` for the options.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from harness import add_options, conduct, workers_of

# Long runs first: one that begins last keeps all waiting.
NAMES = (
    "sparsity_by_length",
    "head_specialisation",
    "annealing_speed",
    "segments",
    "block_sizes",
    "varied_and_uniform",
    "distilled_patterns",
    "regulariser",
    "input_dependent_sparsity",
)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="experiments")
    add_options(parser)
    parsed = parser.parse_args()
    experiments = [importlib.import_module(name).EXPERIMENT for name in parsed.only]
    return conduct(experiments, workers_of(parsed), seeds=parsed.seeds, quick=parsed.quick)


if __name__ == "__main__":
    sys.exit(main())
