"""A hundred million bytes of text that are on every machine with PyTorch: Python sources."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from dilated_attention_pytorch.tasks.text import TextData, standard_library_files

# PyTorch and what it cannot be installed without.
PACKAGES = ("torch", "sympy", "networkx")


@lru_cache
def python_sources(max_bytes: int | None = None, validation_share: float = 0.05) -> TextData:
    """Sources of the standard library and of :data:`PACKAGES`, as bytes; read once per process.

    Whole files are held out, the first in the order of a hash of their names.

    Args:
        max_bytes: Stop after the file with which there are as many. None: all.
        validation_share: Of the bytes, to hold out.
    """
    contents: list[tuple[str, bytes]] = []
    size = 0
    for name, path in sorted(_files(), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        content = path.read_bytes()
        if content:
            contents.append((name, content))
            size += len(content)
        if max_bytes is not None and size >= max_bytes:
            break
    held, bytes_held = 0, 0
    while bytes_held < validation_share * size:
        bytes_held += len(contents[held][1])
        held += 1
    return TextData(
        _join(contents[held:]),
        _join(contents[:held]),
        tuple(name for name, _ in contents[held:]),
        tuple(name for name, _ in contents[:held]),
        f"Python sources of the standard library, {', '.join(PACKAGES)}",
    )


def _files() -> list[tuple[str, Path]]:
    """Names that do not depend on where things are installed, and paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [(path.relative_to(root).as_posix(), path) for path in standard_library_files()]
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"the text needs the sources of {package}.")
        folder = Path(spec.origin).parent
        found += [
            (path.relative_to(folder.parent).as_posix(), path) for path in folder.rglob("*.py")
        ]
    return found


def _join(contents: list[tuple[str, bytes]]) -> Tensor:
    # A zero byte, which no source contains, tells that a file begins.
    return torch.frombuffer(bytearray(b"\0".join(x for _, x in contents)), dtype=torch.uint8)
