"""``dilated-attention tune``: trains selectors, and LoRA or all weights, on the next token."""

from __future__ import annotations

import argparse
from typing import Any

from dilated_attention_pytorch.cli.pretrained_command import PretrainedCommand, add_job_options


def add_parser(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "tune",
        help="tune a sparse pretrained model end to end",
        description="Trains the selectors of a pretrained model, and low-rank changes or all of "
        "its weights, on the language-modelling loss at a sparsity. Ctrl-C stops after the current "
        "step; --resume goes on exactly.",
    )
    parser.set_defaults(command=run)
    add_job_options(parser, "runs/tune")
    for flag, choices, what in (
        ("train", ("selectors", "lora", "all"), "what is trained (default: lora)"),
        ("attention", ("sparse", "dense"), "dense: the baseline (default: sparse)"),
    ):
        parser.add_argument(f"--{flag}", choices=choices, default=argparse.SUPPRESS, help=what)
    parser.add_argument(
        "--adapter", metavar="DIR", default=argparse.SUPPRESS,
        help="selectors to start from, as distill wrote them",
    )  # fmt: skip
    for flag, kind, what in (
        ("base-learning-rate", float, "peak rate of LoRA or of the weights (default: 0.0001)"),
        ("lora-rank", int, "rank of the changes (default: 16)"),
        ("sparsity-warmup", float, "share of the steps from dense to sparse (default: 0.1)"),
        ("calibrate-every", int, "steps between two calibrations (default: 50)"),
        ("selector-every", int, "selectors learn in one of so many steps (default: 8)"),
    ):
        parser.add_argument(
            f"--{flag}", type=kind, metavar="N" if kind is int else "X",
            default=argparse.SUPPRESS, help=what,
        )  # fmt: skip


def run(parsed: argparse.Namespace) -> int:
    """Tunes; returns the exit code."""
    return TuneCommand(parsed).run()


class TuneCommand(PretrainedCommand):
    """Writes what was trained."""

    KIND = "tune"

    def asked(self, run: Any) -> dict[str, float]:
        """The same; dense attention leaves nothing out."""
        return {} if run.attention == "dense" else {"base_sparsity": run.base_sparsity}

    def results(self, loop: Any) -> dict[str, str]:
        """The folders that are there."""
        out, names = self.parsed.out, ("adapter", "lora", "model")
        return {name: str(out / name) for name in names if (out / name).is_dir()}
