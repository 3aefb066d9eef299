"""What ``evaluate`` and ``allot`` share: the bar of a measurement, and how its errors read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from dilated_attention_pytorch.cli.bar import ProgressBar, words_column
from dilated_attention_pytorch.cli.console import PlainConsole
from dilated_attention_pytorch.cli.errors import CommandError


def measuring_bar(console: PlainConsole) -> ProgressBar:
    """A bar that counts measurements."""
    columns = (
        words_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    return ProgressBar(*columns, console=console)


@contextmanager
def measuring_errors() -> Iterator[None]:
    """Turns what can go wrong while measuring a model into a message.

    Raises:
        CommandError: If memory runs out, or files, model or text do not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CommandError(
            f"out of memory; lower --lengths, or use --dtype bfloat16. {error}"
        ) from error
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
