"""``dilated-attention distill``: teaches selectors where a pretrained model's attention goes."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from dilated_attention_pytorch.cli.pretrained_options import (
    add_model_and_text,
    add_run_folder,
    add_run_options,
    add_selector_options,
)
from dilated_attention_pytorch.cli.pretrained_run import run_job


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
    add_model_and_text(parser, required=False)
    add_run_folder(parser, "runs/distill")
    parser.add_argument(
        "--target", choices=("mass", "gradient"), default=argparse.SUPPRESS,
        help="mass: where attention goes; gradient: weighted by what the loss cares about "
        "(default: mass)",
    )  # fmt: skip
    add_run_options(parser)
    add_selector_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Distils; returns the exit code."""
    from dilated_attention_pytorch.integrations.transformers.distill import DistillRun

    def finish(loop: Any, console: Console) -> dict[str, Any]:
        adapter = {"adapter": str(parsed.out / "adapter")}
        try:
            from dilated_attention_pytorch.analysis.selector_plots import plot_recall

            figure = plot_recall(loop.metrics.read())
        except ImportError:
            console.print("No plot: it needs matplotlib (the extra [viz]).")
            return adapter
        figure.savefig(parsed.out / "recall.png", dpi=120)
        return {**adapter, "plot": str(parsed.out / "recall.png")}

    return run_job(parsed, DistillRun, finish)
