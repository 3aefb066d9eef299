"""What ``distill`` and ``tune`` share: run a job in a folder, with a bar, and sum it up."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dilated_attention_pytorch.cli.errors import OK, CommandError, UsageError
from dilated_attention_pytorch.cli.interrupt import StopRequest
from dilated_attention_pytorch.cli.pretrained_options import (
    build_job,
    named,
    require_transformers,
)
from dilated_attention_pytorch.training.checkpoint import CheckpointError
from dilated_attention_pytorch.training.language_model import TrainingError


def run_job(
    parsed: argparse.Namespace, kind: type, finish: Callable[[Any, Console], dict[str, Any]]
) -> int:
    """Starts or resumes a job, trains, saves and prints; returns the exit code.

    Args:
        parsed: The command line.
        kind: ``DistillRun`` or ``TuneRun``.
        finish: Called with the finished loop; returns further lines of the summary.

    Raises:
        CommandError: If it cannot be done.
        UsageError: If the options do not fit.
    """
    require_transformers()
    console = Console(stderr=True)
    try:
        loop = _open(parsed, kind)
        with StopRequest() as stop:
            _train(loop, stop, console)
        summary = _summary(loop)
        if loop.training.done:
            loop.training.save(parsed.out)
            summary |= finish(loop, console)
    except torch.OutOfMemoryError as error:
        raise CommandError(
            f"out of memory; lower --batch-size or --seq-len, or use --dtype bfloat16. {error}"
        ) from error
    except (CheckpointError, TrainingError, OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if parsed.json:
        print(json.dumps(summary, indent=2))
    else:
        Console().print(_table(parsed.name, summary))
    if loop.training.done:
        return OK
    command = f"dilated-attention {parsed.name} --out {shlex.quote(str(parsed.out))} --resume"
    console.print(
        f"Stopped at step {loop.training.step_count} of {loop.training.run.steps}; saved. "
        f"To go on:\n  {command}",
        highlight=False,
        soft_wrap=True,
    )
    return stop.exit_code


def _open(parsed: argparse.Namespace, kind: type) -> Any:
    from dilated_attention_pytorch.integrations.transformers.job import PretrainedLoop

    options = named(parsed)
    if parsed.resume:
        if options:
            raise UsageError(
                f"--resume takes the settings of the run: leave {sorted(options)} out."
            )
        return PretrainedLoop.resume(parsed.out)
    try:
        return PretrainedLoop.start(parsed.out, build_job(kind, options))
    except FileExistsError as error:
        raise UsageError(str(error)) from error


def _train(loop: Any, stop: StopRequest, console: Console) -> None:
    training = loop.training
    count = sum(p.numel() for p in training.trained())
    console.print(
        f"{count:,} parameters to train, on {loop.text.source}: {len(loop.text.train):,} tokens "
        f"({len(loop.text.validation):,} held out)",
        highlight=False,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(
            "training", total=training.run.steps, completed=training.step_count, state=""
        )
        shown = loop.latest
        for result in loop.run(stop):
            state = f"loss {result['loss']:.4f}  {result['tokens_per_second']:,.0f} tokens/s"
            bar.update(task, completed=training.step_count, state=state)
            if loop.latest is not shown:
                shown = loop.latest
                words = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
                bar.console.print(f"step {training.step_count}: {words}", highlight=False)


def _summary(loop: Any) -> dict[str, Any]:
    training = loop.training
    return {
        "finished": training.done,
        "steps": training.step_count,
        "steps_planned": training.run.steps,
        "seconds": round(training.seconds, 1),
        "trained_parameters": sum(p.numel() for p in training.trained()),
        **loop.latest,
        "metrics": str(loop.metrics.path),
    }


def _table(name: str, summary: dict[str, Any]) -> Table:
    table = Table(show_header=False, title=name.capitalize(), title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in summary.items():
        shown = f"{value:.4f}" if isinstance(value, float) else f"{value}"
        table.add_row(key.replace("_", " "), shown)
    return table
