"""Text of a user's choosing, made safe to show."""

from __future__ import annotations


def printable(text: object, keep: str = "") -> str:
    r"""Text as one line in which everything that does not print is escaped, as ``repr`` does.

    A file's name may hold line ends, the escape sequences by which terminals are steered, marks
    that reverse the direction of what follows, or bytes that are no UTF-8 and cannot be written.

    Args:
        text: Anything; its ``str`` is shown.
        keep: Characters to leave as they are.

    Example:
        >>> printable("runs/\x1b[31mred\n")
        'runs/\\x1b[31mred\\n'
    """
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    code = ord(character)
    # How Python holds a byte of a file's name that is no UTF-8.
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
