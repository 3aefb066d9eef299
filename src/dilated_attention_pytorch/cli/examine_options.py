"""What ``report`` and ``diagnose`` share: the folder and the text that they look at."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dilated_attention_pytorch.cli.console import PlainConsole
from dilated_attention_pytorch.cli.errors import CommandError, UsageError
from dilated_attention_pytorch.cli.examined import Examined
from dilated_attention_pytorch.cli.examined_run import ExaminedRun
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.train.checkpoint import list_checkpoints
from dilated_attention_pytorch.train.loop import CHECKPOINTS_NAME


def add_options(parser: argparse.ArgumentParser, samples: int) -> None:
    """Adds what to look at: the folder, the text, and how much of it.

    Args:
        parser: Of the command.
        samples: Default of ``--samples``.
    """
    parser.add_argument(
        "folder", type=Path, metavar="RUN_OR_ADAPTER",
        help="--out of dilated-attention train, distill or tune, or the folder of an adapter",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="text to look at (default: what the run has held out, if the run is your own)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="DIR",
        help="base model of an adapter (default: the folder that it was made from)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=samples, metavar="N",
        help=f"windows of the text (default: {samples})",
    )  # fmt: skip
    parser.add_argument(
        "--seq-len", type=int, metavar="N",
        help="tokens per window of an adapter (default: as it was trained, at most 2048)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")


def open_examined(parsed: argparse.Namespace, least: int = 1) -> Examined:
    """Opens what the command line names.

    Args:
        parsed: With the options of :func:`add_options`.
        least: Fewest samples that the command needs.

    Raises:
        UsageError: If an option is out of range or would be ignored.
        CommandError: If the folder is neither a run nor an adapter, or cannot be examined.
    """
    if parsed.samples < least:
        why = " (patterns of two inputs are compared)" if least > 1 else ""
        raise UsageError(f"--samples must be at least {least}{why}, got {parsed.samples}.")
    folder: Path = parsed.folder
    # The folder itself, or what a run of distill or tune has written there.
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter.json").is_file():
            from dilated_attention_pytorch.cli.examined_adapter import open_adapter

            return _noted(open_adapter(adapter, parsed))
    if not list_checkpoints(folder / CHECKPOINTS_NAME):
        raise CommandError(
            f"{folder} is neither a run (no checkpoint in it) nor an adapter (no adapter.json). "
            "Name the --out of dilated-attention train, distill or tune, or a folder that "
            "save_adapter wrote."
        )
    for name in ("model", "seq_len"):
        if getattr(parsed, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}: no effect on a run of train, which holds its own "
                "model; leave it out."
            )
    return _noted(ExaminedRun.open(folder, parsed.text, parsed.samples, parsed.device))


def _noted(examined: Examined) -> Examined:
    if examined.note:
        PlainConsole(stderr=True).print(printable(examined.note), soft_wrap=True)
    return examined


@contextmanager
def at_work(what: str) -> Iterator[None]:
    """Says what takes its time.

    Raises:
        CommandError: In the place of running out of memory.
    """
    try:
        console = PlainConsole(stderr=True)
        if not console.is_terminal:
            console.print(f"{what} (minutes for a large model on a CPU)")
        with console.status(what):
            yield
    except torch.OutOfMemoryError as error:
        raise CommandError(f"out of memory; lower --samples or --seq-len. {error}") from error
