"""``dilated-attention train``: a byte-level language model on real text."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dilated_attention_pytorch.cli.errors import OK, CommandError, UsageError
from dilated_attention_pytorch.cli.interrupt import StopRequest
from dilated_attention_pytorch.cli.options import add_run_options, build_settings, named_options
from dilated_attention_pytorch.tasks.text import TextError
from dilated_attention_pytorch.training.checkpoint import CheckpointError, checkpoint_path
from dilated_attention_pytorch.training.language_model import TrainingError
from dilated_attention_pytorch.training.loop import TrainingLoop

DEFAULT_OUT = "runs/train"


def add_parser(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "train",
        help="train a byte-level language model on real text",
        description="Trains a byte-level causal language model, with attention of your choice, on "
        "the Python standard library's sources or on text of your own. Ctrl-C stops it after the "
        "current step; --resume goes on, with bit for bit the result of an uninterrupted run.",
    )
    parser.set_defaults(command=run)
    parser.add_argument(
        "--out", type=Path, default=Path(DEFAULT_OUT), metavar="DIR",
        help=f"where metrics and checkpoints go (default: {DEFAULT_OUT})",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, with its settings"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON (progress goes to stderr)"
    )
    add_run_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Trains; returns the exit code."""
    console = Console(stderr=True)
    try:
        loop = _open(parsed)
        with StopRequest() as stop:
            _train(loop, stop, console)
    except (TextError, CheckpointError, TrainingError, OSError) as error:
        raise CommandError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise CommandError(f"out of memory; lower --batch-size or --seq-len. {error}") from error
    finished = loop.training.done
    # A signal during the very last step stops nothing.
    code = OK if finished else stop.exit_code
    if finished and loop.latest_validation is None:
        loop.latest_validation = loop.training.validate()
    summary = _summary(loop)
    if parsed.json:
        print(json.dumps(summary, indent=2))
    else:
        Console().print(_table(summary))
    if not finished:
        command = f"dilated-attention train --out {shlex.quote(str(parsed.out))} --resume"
        console.print(
            f"Stopped at step {loop.training.step_count} of {loop.training.run.steps}; saved. "
            f"To go on:\n  {command}",
            highlight=False,
            soft_wrap=True,
        )
    return code


def _open(parsed: argparse.Namespace) -> TrainingLoop:
    options = named_options(parsed)
    if parsed.resume:
        every = options.pop("checkpoint_every", None)
        try:
            return TrainingLoop.resume(parsed.out, changes=options, checkpoint_every=every)
        except (TextError, CheckpointError):
            raise
        except ValueError as error:
            raise UsageError(str(error)) from error
    try:
        return TrainingLoop.start(parsed.out, *build_settings(options))
    except (TextError, CheckpointError):
        raise
    except (FileExistsError, ValueError) as error:
        raise UsageError(str(error)) from error


def _train(loop: TrainingLoop, stop: StopRequest, console: Console) -> None:
    training = loop.training
    text, parameters = loop.text, sum(p.numel() for p in training.model.parameters())
    console.print(
        f"{training.run.attention} attention, {parameters:,} parameters, on {text.source}: "
        f"{len(text.train):,} bytes of {len(text.train_files):,} files "
        f"({len(text.validation):,} bytes of {len(text.validation_files):,} held out)",
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
        for progress in loop.run(stop):
            result = progress.result
            state = [f"loss {result.loss:.3f}"]
            if result.sparsity is not None:
                state.append(f"sparsity {result.sparsity:.3f}")
            if result.temperature is not None:
                state.append(f"temperature {result.temperature:.2f}")
            state.append(f"{progress.tokens_per_second:,.0f} tokens/s")
            bar.update(task, completed=result.step, state="  ".join(state))
            if progress.validation is not None:
                bar.console.print(
                    f"step {result.step}: held-out {progress.validation.bits_per_byte:.3f} "
                    "bits per byte",
                    highlight=False,
                )


def _summary(loop: TrainingLoop) -> dict[str, Any]:
    training, validation = loop.training, loop.latest_validation
    run = training.run
    tokens = training.step_count * run.batch_size * run.seq_len
    lines = [line for line in loop.metrics.read() if "loss" in line]
    return {
        "attention": run.attention,
        "finished": training.done,
        "steps": training.step_count,
        "steps_planned": run.steps,
        "training_loss": lines[-1]["loss"] if lines else None,
        "validation_loss": None if validation is None else validation.loss,
        "validation_bits_per_byte": None if validation is None else validation.bits_per_byte,
        "validation_sparsity": None if validation is None else validation.sparsity,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "seconds": round(training.seconds, 3),
        "tokens_per_second": round(tokens / training.seconds, 1) if training.seconds else None,
        "metrics": str(loop.metrics.path),
        "checkpoint": str(checkpoint_path(loop.checkpoints, training.step_count)),
    }


def _table(summary: dict[str, Any]) -> Table:
    table = Table(show_header=False, title="Training", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    table.add_row("attention", summary["attention"])
    table.add_row("steps", f"{summary['steps']:,} of {summary['steps_planned']:,}")
    table.add_row("training loss", f"{number(summary['training_loss'], 4)} nats per byte")
    bits = summary["validation_bits_per_byte"]
    loss = number(summary["validation_loss"], 4)
    table.add_row("held-out loss", f"{loss} nats, {number(bits, 4)} bits per byte")
    sparsity = summary["validation_sparsity"]
    # What was not measured yet and what is dense are told apart by the loss beside it.
    dense = summary["attention"] == "dense"
    table.add_row("sparsity, held-out", "0 (dense)" if dense else number(sparsity, 4))
    table.add_row("parameters", f"{summary['parameters']:,}")
    table.add_row("seconds", number(summary["seconds"], 1))
    table.add_row("tokens/s", number(summary["tokens_per_second"], 0))
    table.add_row("metrics", summary["metrics"])
    table.add_row("checkpoint", summary["checkpoint"])
    return table
