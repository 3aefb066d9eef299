"""``dilated-attention train``: a byte-level language model on real text."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dilated_attention_pytorch.cli.errors import INTERRUPTED, OK, CommandError, UsageError
from dilated_attention_pytorch.cli.options import add_run_options, build_settings, named_options
from dilated_attention_pytorch.tasks.text import TextError
from dilated_attention_pytorch.training.checkpoint import CheckpointError
from dilated_attention_pytorch.training.language_model import StepResult, TrainingError
from dilated_attention_pytorch.training.loop import METRICS_NAME, TrainingLoop


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train", help="train a byte-level language model on text"
    )
    parser.add_argument("--out", default="runs/train", metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_run_options(parser)
    parser.set_defaults(command=run)


class _Stop:
    """Turns the first Ctrl-C into a stop after the current step; the second interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Stop:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


def run(parsed: argparse.Namespace) -> int:
    """Trains, or goes on."""
    console = Console(stderr=True)
    try:
        loop = _open(parsed)
        with _Stop() as stop:
            _train(loop, stop, console)
    except (CheckpointError, TextError, TrainingError, OSError) as error:
        raise CommandError(str(error)) from error
    summary = _summary(loop)
    if parsed.json:
        print(json.dumps(summary))
    else:
        Console().print(_table(summary))
    if loop.training.done:
        return OK
    console.print(f"stopped; go on with: dilated-attention train --resume --out {parsed.out}")
    return INTERRUPTED


def _open(parsed: argparse.Namespace) -> TrainingLoop:
    folder, options = Path(parsed.out), named_options(parsed)
    if not parsed.resume:
        return TrainingLoop.start(folder, *build_settings(options))
    interval = options.pop("checkpoint_every", None)
    flat = {name.removeprefix("config."): value for name, value in options.items()}
    if "config.num_layers" in options:
        raise UsageError("--scorer-layers cannot be given with --resume; leave it out.")
    try:
        return TrainingLoop.resume(folder, changes=flat, checkpoint_every=interval)
    except CheckpointError:
        raise
    except (ValueError, KeyError) as error:
        raise UsageError(str(error)) from error


def _train(loop: TrainingLoop, stop: _Stop, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(
            loop.training.run.attention,
            total=loop.training.run.steps,
            completed=loop.training.step_count,
            state="",
        )
        for progress in loop.run(stop):
            state = describe(progress.result, progress.tokens_per_second)
            bar.update(task, completed=progress.result.step, state=state)


def describe(result: StepResult, tokens_per_second: float) -> str:
    """Loss, sparsity, temperature and throughput in a few words."""
    parts = [f"loss {result.loss:.3f}"]
    if result.sparsity is not None:
        parts.append(f"sparsity {result.sparsity:.2f}")
    if result.temperature is not None:
        parts.append(f"temperature {result.temperature:.2f}")
    return "  ".join([*parts, f"{tokens_per_second:,.0f} bytes/s"])


def _summary(loop: TrainingLoop) -> dict[str, Any]:
    last = loop.latest_validation
    return {
        "attention": loop.training.run.attention,
        "steps": loop.training.step_count,
        "validation_loss": None if last is None else last.loss,
        "validation_bits_per_byte": None if last is None else last.bits_per_byte,
        "validation_sparsity": None if last is None else last.sparsity,
        "seconds": loop.training.seconds,
        "metrics": str(loop.folder / METRICS_NAME),
        "checkpoints": str(loop.checkpoints),
    }


def _table(summary: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    for name, value in summary.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    return table
