"""``dilated-attention distill``: teaches selectors where a pretrained model's attention goes."""

from __future__ import annotations

import argparse
from typing import Any

from dilated_attention_pytorch.cli.pretrained_command import PretrainedCommand, add_job_options
from dilated_attention_pytorch.selection.bounds import most_sparse


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

    def about(self, loop: Any) -> str:
        """Sizes, and whether there is anything to choose."""
        run, words = loop.training.run, super().about(loop)
        config, length = run.config, run.seq_len
        limit = most_sparse(
            length, config.block_size, config.num_sink_blocks, config.num_local_blocks
        )
        if config.base_sparsity > limit:
            words += (
                f"\nNothing to choose at sparsity {config.base_sparsity:g}: in {length:,} tokens "
                f"the blocks that are always read leave out {limit:.2f} at most. Take smaller "
                "blocks, longer windows or a lower sparsity."
            )
        return words

    def results(self, loop: Any) -> dict[str, str]:
        """The adapter, and the plot where matplotlib is there."""
        out = self.parsed.out
        adapter = {"adapter": str(out / "adapter")}
        try:
            from dilated_attention_pytorch.analysis.selector_plots import plot_recall
        except ImportError:
            self.console.print("No plot: it needs matplotlib (the extra [viz]).")
            return adapter
        plot_recall(loop.metrics.read()).savefig(out / "recall.png", dpi=120)
        return {**adapter, "plot": str(out / "recall.png")}
