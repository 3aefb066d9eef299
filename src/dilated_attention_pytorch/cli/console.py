"""What all commands print with, and the errors that end them.

What is printed is shown as it is and steers nothing: names, texts and messages may hold anything.
"""

from __future__ import annotations

import io
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dilated_attention_pytorch.files import write_atomically
from dilated_attention_pytorch.foreign_text import printable

OK, FAILURE = 0, 1
# Seconds between two lines of a bar without a terminal.
_INTERVAL = 10.0


class CommandError(Exception):
    """The command could not do its work."""

    exit_code = FAILURE


class UsageError(CommandError):
    """The command line asks for something that cannot be."""

    exit_code = 2


@contextmanager
def failing(remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raises CommandError in the place of ``kinds`` of errors, whose own words say enough.

    Where memory runs out, ``remedy`` says how to need less.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CommandError(f"out of memory; {remedy}. {error}") from error
    except kinds as error:
        raise CommandError(str(error)) from error


class PlainConsole(Console):
    """A console to which a string is text: never markup, an emoji's name or an escape sequence.

    What is to be styled is a :class:`rich.text.Text`, whose own content goes through
    :func:`printable`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a string, with all but line ends escaped that does not print."""
        shown = printable(text, keep="\n")
        # A terminal may know fewer letters.
        shown = shown.encode(self.encoding, "backslashreplace").decode(self.encoding)
        plain = {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(shown, **{**options, **plain})


class ProgressBar(Progress):
    """A bar on a terminal; elsewhere, as in a log, a line every ten seconds."""

    def __init__(self, *columns: ProgressColumn, console: PlainConsole) -> None:
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._next_line = 0.0

    def add_task(self, description: str, **values: Any) -> TaskID:  # type: ignore[override]
        """As rich's; what it is called is shown as it is."""
        return super().add_task(printable(description), **values)

    def update(self, task_id: TaskID, **values: Any) -> None:
        """As rich's, and perhaps a line; words are shown as they are."""
        shown: dict[str, Any] = {
            name: printable(value) if isinstance(value, str) else value
            for name, value in values.items()
        }
        super().update(task_id, **shown)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich's, and perhaps a line."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        if self.console.is_terminal or not task.visible or now < self._next_line:
            return
        self._next_line = now + _INTERVAL
        # A single job counts its share.
        one = task.total == 1
        done = f"{task.percentage:.0f} %" if one else f"{task.completed:g} of {task.total:g}"
        words = [task.description, done, *task.fields.values()]
        self.console.print(": ".join(str(word) for word in words if word), soft_wrap=True)


def words_column(words: str) -> TextColumn:
    """A column of words about the task, as in rich's but without markup."""
    return TextColumn(words, markup=False)


def counting_bar(console: PlainConsole, *words: str) -> ProgressBar:
    """A bar that counts steps, with further columns of words."""
    columns = (
        words_column("{task.description}"), BarColumn(), MofNCompleteColumn(),
        *map(words_column, words), TimeRemainingColumn(),
    )  # fmt: skip
    return ProgressBar(*columns, console=console)


def reason(error: OSError | ValueError) -> object:
    """Why a file could not be written; a name that the system cannot have is a ValueError."""
    return getattr(error, "strerror", None) or error


def shell_word(text: object) -> str:
    r"""A path as a shell takes it, whatever is in it.

    Example:
        >>> print(shell_word("my runs"), shell_word("runs/\udcff"))
        'my runs' $'runs/\xff'
    """
    plain, shown = str(text), printable(text)
    if shown == plain:
        return shlex.quote(plain)
    # Escapes are read between $' and '. What is shown as one there must have been escaped here.
    kept = plain.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(kept)}'"


def write_page(path: Path, html: str, console: PlainConsole) -> None:
    """Writes a page, whole or not at all (CommandError), and says where it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, html.encode("utf-8", "backslashreplace"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {path}: {reason(error)}.") from error
    console.print(f"Open {printable(path.resolve())} in a browser.", soft_wrap=True)


def write_plot(draw: Callable[[Any], Any], rows: Any, path: Path, console: PlainConsole) -> bool:
    """Writes what ``draw`` makes of rows as PNG, whole or not at all.

    False: there is no matplotlib.
    """
    try:
        figure = draw(rows)
    except ImportError:
        console.print("No plot: it needs matplotlib (the extra [viz]).")
        return False
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())
    return True
