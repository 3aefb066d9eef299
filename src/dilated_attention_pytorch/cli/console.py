"""The console of all commands: what it prints is shown as it is and steers nothing."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from dilated_attention_pytorch.printable import printable


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


def styled(text: object, style: str) -> Text:
    """Text in a style, shown as it is."""
    return Text(printable(text), style)
