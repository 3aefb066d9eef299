"""A metrics file that never disagrees with the checkpoint: JSON lines, one per logged step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dilated_attention_pytorch.atomic_file import write_atomically

# The one field that holds a number per layer.
PER_LAYER = "layer_sparsity"
# Bytes of a line; a thousand layers need a fiftieth.
_LONGEST = 1 << 20
# Whole numbers that a JSON reader of any language keeps.
_LARGEST_STEP = 2**53


class MetricsFile:
    """Appends one JSON object per line; every object has a ``"step"`` and else numbers or null.

    Args:
        path: The file; its folder must exist.

    Attributes:
        note: What :meth:`read` left out, in words; None: nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.note: str | None = None

    def start(self) -> None:
        """Empties the file."""
        write_atomically(self.path, b"")

    def rewind(self, step: int) -> int:
        """Drops what lies after a step, what was cut off, and what is no line of ours.

        Returns:
            Lines dropped.
        """
        if not self.path.is_file():
            self.start()
            return 0
        with open(self.path, "rb") as file:
            lines = list(_lines(file))
        kept = [line for line in lines if line.endswith(b"\n") and _is_up_to(line, step)]
        write_atomically(self.path, b"".join(kept))
        return len(lines) - len(kept)

    def append(self, values: dict[str, Any]) -> None:
        """Writes one line, behind a line end if the one before was cut off."""
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        with open(self.path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)

    def sync(self) -> None:
        """Makes sure that the lines are on the disk, before a checkpoint counts on it."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All lines that are whole; :attr:`note` tells of the others. No file: no lines."""
        self.note = None
        if not self.path.is_file():
            return []
        found, odd = [], []
        with open(self.path, "rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                values = parse_line(line)
                if values is None:
                    odd.append(number)
                else:
                    found.append(values)
        if odd:
            which = f"line {odd[0]}" if len(odd) == 1 else f"{len(odd)} lines, {odd[0]} the first,"
            self.note = f"{which} of {self.path} cannot be read and is left out."
        return found


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The values of a line of metrics, or None if it is cut, damaged or something else.

    Example:
        >>> parse_line(b'{"step": 10, "loss": 2.5}'), parse_line(b'{"step": 10, "lo')
        ({'step': 10, 'loss': 2.5}, None)
    """
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    step = values.get("step")
    if type(step) is not int or not 0 <= step <= _LARGEST_STEP:
        return None
    if all(_is_value(name, value) for name, value in values.items()):
        return values
    return None


def _is_value(name: str, value: object) -> bool:
    if name == PER_LAYER:
        return value is None or (isinstance(value, list) and all(map(_is_number, value)))
    return value is None or _is_number(value)


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= _LARGEST_STEP
    return type(value) is float and math.isfinite(value)


def _is_up_to(line: bytes, step: int) -> bool:
    values = parse_line(line)
    return values is not None and values["step"] <= step


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one that is too long, the start without one."""
    while line := file.readline(_LONGEST):
        yield line
        # The rest of it is no line of its own.
        while len(line) == _LONGEST and not line.endswith(b"\n"):
            line = file.readline(_LONGEST)
