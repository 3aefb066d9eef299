"""The console of all commands: what it prints is shown as it is and steers nothing."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console
from rich.text import Text

from dilated_attention_pytorch.foreign_text import printable


class PlainConsole(Console):
    """A console to which a string is text: never markup, an emoji's name or an escape sequence.

    Paths, texts and messages may hold anything. What is to be styled is a :class:`rich.text.Text`,
    whose own content goes through :func:`printable`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a string, with all but line ends escaped that does not print."""
        shown = printable(text, keep="\n")
        # A terminal may know fewer letters.
        shown = shown.encode(self.encoding, "backslashreplace").decode(self.encoding)
        plain = {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(shown, **{**options, **plain})


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


def styled(text: object, style: str) -> Text:
    """Text in a style, shown as it is."""
    return Text(printable(text), style)
