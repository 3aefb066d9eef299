"""``dilated-attention distill``: teaches selectors where a pretrained model's attention goes."""

from __future__ import annotations

import argparse
from typing import Any

from dilated_attention_pytorch.cli.pretrained_command import PretrainedCommand, add_job_options
from dilated_attention_pytorch.cli.write_figure import write_figure


def add_parser(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "distill",
        help="make a pretrained model's attention sparse: distil its selectors",
        description="Trains one selector per attention layer of a frozen pretrained model on "
        "where the model's own attention goes, and writes them as an adapter. Ctrl-C stops after "
        "the current step; --resume goes on exactly.",
    )
    parser.set_defaults(command=run)
    add_job_options(parser, "runs/distill")
    parser.add_argument(
        "--target", choices=("mass", "gradient"), default=argparse.SUPPRESS,
        help="mass: where attention goes; gradient: weighted by what the loss cares about "
        "(default: mass)",
    )  # fmt: skip


def run(parsed: argparse.Namespace) -> int:
    """Distils; returns the exit code."""
    return DistillCommand(parsed).run()


class DistillCommand(PretrainedCommand):
    """Writes an adapter and a plot of how well it chooses."""

    KIND = "distill"

    def results(self, loop: Any) -> dict[str, str]:
        """The adapter, and the plot where matplotlib is there."""
        out = self.parsed.out
        adapter = {"adapter": str(out / "adapter")}
        try:
            from dilated_attention_pytorch.analysis.plots import plot_recall
        except ImportError:
            self.console.print("No plot: it needs matplotlib (the extra [viz]).")
            return adapter
        write_figure(plot_recall(loop.metrics.read()), out / "recall.png")
        return {**adapter, "plot": str(out / "recall.png")}
