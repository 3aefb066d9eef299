"""A metrics file that never disagrees with the checkpoint: JSON lines, one per logged step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.training.checkpoint import write_atomically


class MetricsFile:
    """Appends one JSON object per line; every object has a ``"step"``.

    Args:
        path: The file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self) -> None:
        """Empties the file."""
        write_atomically(self.path, b"")

    def rewind(self, step: int) -> int:
        """Drops what lies after a step, and a line that was cut off.

        Returns:
            Lines dropped.
        """
        if not self.path.is_file():
            self.start()
            return 0
        content = self.path.read_bytes()
        lines = content.split(b"\n")
        complete, rest = lines[:-1], lines[-1]
        kept = [line for line in complete if _step(line) <= step]
        write_atomically(self.path, b"".join(line + b"\n" for line in kept))
        return len(complete) - len(kept) + bool(rest)

    def append(self, values: dict[str, Any]) -> None:
        """Writes one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Makes sure that the lines are on the disk, before a checkpoint counts on it."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        with open(self.path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # Not a line of ours: drop it with what lies after the checkpoint.
        return float("inf")
