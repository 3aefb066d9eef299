"""Commands that train in a folder: they hold it, show a bar, stop when asked, and sum it up."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from rich.table import Table

from dilated_attention_pytorch.cli.console import (
    OK,
    CommandError,
    PlainConsole,
    counting_bar,
    failing,
    reason,
    shell_word,
)
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.train.language_model import TrainingError
from dilated_attention_pytorch.train.loop import FolderLoop, Progress
from dilated_attention_pytorch.train.run_folder import FolderInUseError, lock_folder


class StopRequest:
    """While open, SIGINT and SIGTERM ask to stop; a second one ends the program at once.

    Called, it says whether a stop was asked for.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._signal is not None

    def __enter__(self) -> StopRequest:
        # In another thread no signal is heard.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 130 for Ctrl-C."""
        return 128 + (self._signal or 0)


@contextmanager
def holding(folder: Path, console: PlainConsole, *, create: bool = True) -> Iterator[None]:
    """Holds a folder while a command writes into it, and makes it where ``create`` says so.

    Raises:
        CommandError: If another command holds it, or it cannot be written to.
    """
    with ExitStack() as stack:
        try:
            held = stack.enter_context(lock_folder(folder, create=create))
        except FolderInUseError as error:
            raise CommandError(str(error)) from error
        except (OSError, ValueError) as error:
            raise CommandError(f"cannot write to {folder}: {reason(error)}.") from error
        if not held and folder.is_dir():
            console.print(
                "This file system has no locks: see to it that no other command writes into the "
                "folder meanwhile.", soft_wrap=True,
            )  # fmt: skip
        yield


class FolderCommand(ABC):
    """A command that trains in a folder; subclasses say what, and in which words."""

    # Of the summary.
    TITLE: ClassVar[str]
    # How to need less memory.
    REMEDY = "lower --batch-size or --seq-len"
    # What to say of the time before the first step.
    BEFORE = ""
    # What is done, step by step.
    DOING, UNIT = "training", "step"

    def __init__(self, parsed: argparse.Namespace) -> None:
        self.parsed = parsed
        self.console = PlainConsole(stderr=True)

    @abstractmethod
    def open(self) -> FolderLoop[Any, Any]:
        """Starts or resumes; raises UsageError if the options do not fit."""

    @abstractmethod
    def about(self, loop: Any) -> str:
        """What is trained on what, before it begins."""

    @abstractmethod
    def state(self, progress: Progress) -> list[str]:
        """What stands beside the bar after a step, before the speed."""

    @abstractmethod
    def measured(self, values: dict[str, Any]) -> str:
        """What was measured on the held-out text."""

    @abstractmethod
    def summary(self, loop: Any) -> dict[str, Any]:
        """What is known at the end; here a finished command also writes its result."""

    @abstractmethod
    def rows(self, summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """The summary for people: names and values."""

    def run(self) -> int:
        """Trains and prints; returns the exit code."""
        out, name = self.parsed.out, self.parsed.name
        with (
            # A new run makes its folder; where there is none to go on with, none is made.
            holding(out, self.console, create=not self.parsed.resume),
            failing(self.REMEDY, TrainingError, OSError, ValueError),
        ):
            if self.BEFORE:
                self.console.print(self.BEFORE)
            loop = self.open()
            with StopRequest() as stop:
                self._train(loop, stop)
            summary = self.summary(loop)
            if loop.metrics.note:
                self.console.print(printable(loop.metrics.note), soft_wrap=True)
        if self.parsed.json:
            print(json.dumps(summary, indent=2))
        else:
            table = Table(show_header=False, title=self.TITLE, title_justify="left")
            table.add_column(style="bold")
            table.add_column(overflow="fold")
            for row in self.rows(summary):
                table.add_row(*row)
            PlainConsole().print(table)
        training = loop.training
        # A signal during the very last step stops nothing.
        if training.done:
            return OK
        self.console.print(
            f"Stopped at {self.UNIT} {training.step_count} of {training.run.steps}; saved. "
            f"To go on:\n  dilated-attention {name} --out {shell_word(out)} --resume",
            soft_wrap=True,
        )
        return stop.exit_code

    def _train(self, loop: FolderLoop[Any, Any], stop: StopRequest) -> None:
        training = loop.training
        self.console.print(self.about(loop), soft_wrap=True)
        with counting_bar(self.console, "{task.fields[state]}") as bar:
            task = bar.add_task(
                self.DOING, total=training.run.steps, completed=training.step_count, state=""
            )
            for progress in loop.run(stop):
                words, rate = self.state(progress), progress.tokens_per_second
                # None where the clock stood still.
                words += [] if rate is None else [f"{rate:,.0f} tokens/s"]
                bar.update(task, completed=training.step_count, state="  ".join(words))
                if progress.measured is not None:
                    shown = self.measured(progress.measured)
                    bar.console.print(f"{self.UNIT} {training.step_count}: {shown}")
