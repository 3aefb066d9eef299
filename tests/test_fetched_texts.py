"""How the texts of the pretrained experiments are taken out of their packages."""

from __future__ import annotations

import importlib
import zlib
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def test_strings_of_an_r_package_come_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams; one string is empty and one holds what looks like the start of another."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = importlib.import_module("fetch_smollm2")
    tricky = b"before \x00\x04\x00\x09\x00\x00\x00\x03abc after"
    parts = [[b"Emma", b"", b"By Jane Austen"], [tricky, b"end"]]
    content = b""
    for strings in parts:
        data = b"X\n\x00\x00\x00\x03" + b"".join(
            b"\x00\x04\x00\x09" + len(text).to_bytes(4, "big") + text for text in strings
        )
        content += len(data).to_bytes(4, "big") + zlib.compress(data)
    assert module._r_strings(content) == [text for strings in parts for text in strings]
