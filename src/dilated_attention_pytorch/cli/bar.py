"""A progress bar that writes plain lines where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import Progress, ProgressColumn, TaskID, TextColumn

from dilated_attention_pytorch.cli.console import PlainConsole
from dilated_attention_pytorch.foreign_text import printable

# Seconds between two lines.
INTERVAL = 10.0


class ProgressBar(Progress):
    """A bar on a terminal; elsewhere, as in a log, a line every ten seconds.

    Args:
        columns: Of the bar.
        console: Where to.
    """

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
        self._next_line = now + INTERVAL
        # A single job counts its share.
        one = task.total == 1
        done = f"{task.percentage:.0f} %" if one else f"{task.completed:g} of {task.total:g}"
        words = [task.description, done, *task.fields.values()]
        self.console.print(": ".join(str(word) for word in words if word), soft_wrap=True)


def words_column(words: str) -> TextColumn:
    """A column of words about the task, as in rich's but without markup."""
    return TextColumn(words, markup=False)
