"""Writes a plot whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.files import write_atomically


def write_figure(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure as PNG.

    Raises:
        OSError: If it cannot be written; what was there before stays.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())
