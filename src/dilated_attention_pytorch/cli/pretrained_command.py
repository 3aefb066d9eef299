"""What ``distill`` and ``tune`` share: a job on a pretrained model, in a folder."""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

from rich.table import Table

from dilated_attention_pytorch.cli.errors import UsageError
from dilated_attention_pytorch.cli.folder_command import (
    FolderCommand,
    add_run_folder,
    named_options,
    speed,
    summary_table,
)
from dilated_attention_pytorch.cli.pretrained_options import (
    add_model_and_text,
    add_run_options,
    add_selector_options,
    build_job,
    require_transformers,
)
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.train.loop import Progress

# Options that say what a run reads: naming them for --resume says that they may be read.
_FILES = frozenset({"model", "text", "adapter"})
# Names in the table where those in JSON would not do.
_WORDS = {"base_sparsity": "sparsity, asked for", "sparsity": "sparsity, held-out"}


class PretrainedCommand(FolderCommand):
    """Trains on a pretrained model; subclasses say what, and what they write."""

    REMEDY = "lower --batch-size or --seq-len, or use --dtype bfloat16"
    BEFORE = "Loading the model, preparing the selectors, measuring: minutes on a CPU."
    KIND: ClassVar[str]

    def open(self) -> Any:
        """Starts or resumes; a resumed job takes no settings but the files that it reads."""
        require_transformers()
        from dilated_attention_pytorch.hf.job import PretrainedLoop

        options = named_options(self.parsed)
        if self.parsed.resume:
            named = {name: options.pop(name) for name in _FILES & set(options)}
            if options:
                raise UsageError(
                    f"--resume takes the settings of the run: leave {sorted(options)} out."
                )
            return PretrainedLoop.resume(self.parsed.out, named)
        try:
            return PretrainedLoop.start(self.parsed.out, build_job(self.KIND, options))
        except FileExistsError as error:
            raise UsageError(str(error)) from error

    def results(self, loop: Any) -> dict[str, str]:
        """Further lines of the summary: what a finished job has written."""
        return {}

    def asked(self, run: Any) -> dict[str, float]:
        """The sparsity that was asked for."""
        return {"base_sparsity": run.config.base_sparsity}

    def about(self, loop: Any) -> str:
        """Sizes of what is trained and of the text."""
        count = sum(p.numel() for p in loop.training.trained())
        return (
            f"{count:,} parameters to train, on {printable(loop.text.source)}: "
            f"{len(loop.text.train):,} tokens ({len(loop.text.validation):,} held out)"
        )

    def state(self, progress: Progress) -> str:
        """Loss and speed."""
        return "  ".join([f"loss {progress.result['loss']:.4f}", *speed(progress)])

    def measured(self, values: dict[str, Any]) -> str:
        """All values."""
        words = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        return words or "nothing to measure: the blocks that are always read leave no choice"

    def summary(self, loop: Any) -> dict[str, Any]:
        """Measurements, time and files; writes the result of a finished job."""
        training = loop.training
        summary = {
            "finished": training.done,
            "steps": training.step_count,
            "steps_planned": training.run.steps,
            **self.asked(training.run),
            "seconds": round(training.seconds, 1),
            "trained_parameters": sum(p.numel() for p in training.trained()),
            **loop.latest,
            "measured_at_step": loop.measured_at,
            "metrics": str(loop.metrics.path),
        }
        if training.done:
            self.console.print("Calibrating and writing the result.")
            loop.save_result()
            summary |= self.results(loop)
        return summary

    def table(self, summary: dict[str, Any]) -> Table:
        """Name by name."""
        table = summary_table(self.parsed.name.capitalize())
        for key, value in summary.items():
            shown = f"{value:.4f}" if isinstance(value, float) else printable(value)
            table.add_row(_WORDS.get(key, key.replace("_", " ")), shown)
        return table


def add_job_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """Adds the options that both commands have.

    Args:
        parser: Of the command.
        folder: Default of ``--out``.
    """
    add_model_and_text(parser, required=False)
    add_run_folder(parser, folder)
    add_run_options(parser)
    add_selector_options(parser)
