"""What ``train``, ``distill`` and ``tune`` share: train in a folder, with a bar, and sum it up."""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table

from dilated_attention_pytorch.cli.bar import ProgressBar, words_column
from dilated_attention_pytorch.cli.console import PlainConsole, shell_word
from dilated_attention_pytorch.cli.errors import OK, CommandError
from dilated_attention_pytorch.cli.holding import holding
from dilated_attention_pytorch.cli.interrupt import StopRequest
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.train.language_model import TrainingError
from dilated_attention_pytorch.train.loop import FolderLoop, Progress


def add_run_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds ``--out``, ``--resume`` and ``--json``."""
    parser.add_argument(
        "--out", type=Path, default=Path(default), metavar="DIR",
        help=f"where metrics, checkpoints and the result go (default: {default})",
    )  # fmt: skip
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, with its settings; of a run that somebody else made, "
        "name the files that it reads",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON (progress goes to stderr)"
    )


def named_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options that the user named, without those of :func:`add_run_folder`; lists as tuples."""
    skipped = {"command", "name", "out", "resume", "json"}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parsed).items()
        if name not in skipped
    }


class FolderCommand(ABC):
    """A command that trains in a folder; subclasses say what, and in which words.

    Args:
        parsed: The command line, with the options of :func:`add_run_folder`.
    """

    # How to need less memory.
    REMEDY = "lower --batch-size or --seq-len"
    # What to say of the time before the first step.
    BEFORE = ""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self.parsed = parsed
        self.console = PlainConsole(stderr=True)

    @abstractmethod
    def open(self) -> FolderLoop[Any, Any]:
        """Starts or resumes.

        Raises:
            UsageError: If the options do not fit.
        """

    @abstractmethod
    def about(self, loop: Any) -> str:
        """What is trained on what, before it begins."""

    @abstractmethod
    def state(self, progress: Progress) -> str:
        """What stands beside the bar after a step."""

    @abstractmethod
    def measured(self, values: dict[str, Any]) -> str:
        """What was measured on the held-out text."""

    @abstractmethod
    def summary(self, loop: Any) -> dict[str, Any]:
        """What is known at the end; here a finished command also writes its result."""

    @abstractmethod
    def table(self, summary: dict[str, Any]) -> Table:
        """The summary for people."""

    def run(self) -> int:
        """Trains and prints; returns the exit code.

        Raises:
            CommandError: If it cannot be done.
            UsageError: If the options do not fit.
        """
        # A new run makes its folder; where there is none to go on with, none is made.
        with holding(self.parsed.out, self.console, create=not self.parsed.resume):
            return self._run()

    def _run(self) -> int:
        try:
            if self.BEFORE:
                self.console.print(self.BEFORE)
            loop = self.open()
            with StopRequest() as stop:
                self._train(loop, stop)
            summary = self.summary(loop)
            if loop.metrics.note:
                self.console.print(printable(loop.metrics.note), soft_wrap=True)
        except torch.OutOfMemoryError as error:
            raise CommandError(f"out of memory; {self.REMEDY}. {error}") from error
        except (TrainingError, OSError, ValueError) as error:
            raise CommandError(str(error)) from error
        if self.parsed.json:
            print(json.dumps(summary, indent=2))
        else:
            PlainConsole().print(self.table(summary))
        training = loop.training
        # A signal during the very last step stops nothing.
        if training.done:
            return OK
        name, out = self.parsed.name, shell_word(self.parsed.out)
        self.console.print(
            f"Stopped at step {training.step_count} of {training.run.steps}; saved. To go on:\n"
            f"  dilated-attention {name} --out {out} --resume",
            soft_wrap=True,
        )
        return stop.exit_code

    def _train(self, loop: FolderLoop[Any, Any], stop: StopRequest) -> None:
        training = loop.training
        self.console.print(self.about(loop), soft_wrap=True)
        columns = (
            words_column("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            words_column("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        with ProgressBar(*columns, console=self.console) as bar:
            task = bar.add_task(
                "training", total=training.run.steps, completed=training.step_count, state=""
            )
            for progress in loop.run(stop):
                bar.update(task, completed=training.step_count, state=self.state(progress))
                if progress.measured is not None:
                    words = self.measured(progress.measured)
                    bar.console.print(f"step {training.step_count}: {words}")
                if progress.remark:
                    remark = f"step {training.step_count}: {progress.remark}"
                    bar.console.print(remark, soft_wrap=True)


def speed(progress: Progress) -> list[str]:
    """The tokens per second of a step; nothing where the clock stood still."""
    rate = progress.tokens_per_second
    return [] if rate is None else [f"{rate:,.0f} tokens/s"]


def summary_table(title: str) -> Table:
    """A table of names and values."""
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
