"""Checkpoints: written whole or not at all, checked when read, never pickled code."""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.atomic_file import UNFINISHED, write_atomically
from dilated_attention_pytorch.strict_json import short_repr

FORMAT = "dilated_attention_pytorch.training"
VERSION = 2

_NAME = re.compile(r"step-(\d+)\.pt")
# As earlier versions called what they were writing.
_UNFINISHED_BEFORE = re.compile(r"(step-\d+\.pt|metrics\.jsonl)\.\d+\.tmp")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another kind; the message says what to do."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first; interrupted writes are not among them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Writes a checkpoint atomically and removes all but the newest ``keep``.

    The file appears under its name only when all of it is on the disk, so a run that is killed at
    any moment leaves the previous checkpoint or the new one, never half of one.

    Args:
        folder: Where checkpoints lie; created if needed.
        step: Optimiser steps done.
        state: Tensors, numbers, strings, and dicts and lists of them.
        keep: Checkpoints to keep, at least 1.

    Returns:
        The path of the new checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    payload = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, "step": step, **state}, payload)
    path = checkpoint_path(folder, step)
    write_atomically(path, payload.getvalue())
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, after checking that every byte of it is as it was written.

    Raises:
        CheckpointError: If the file is missing, damaged, or no checkpoint of this version.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}.")
    try:
        # torch does not verify the sums that it writes.
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, path.stat().st_size)
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(_damaged(path, f"{damaged} fails its checksum"))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        # Whatever a damaged archive makes the readers raise, the user's remedy is the same.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(_damaged(path, reason)) from error
    if not isinstance(state, dict) or not _is(state.get("format"), FORMAT):
        raise CheckpointError(f"{path} is not a checkpoint of dilated-attention train.")
    if not _is(state.get("version"), VERSION):
        raise CheckpointError(
            f"{path} has version {short_repr(state.get('version'))}; this package reads version "
            f"{VERSION}. Go on with the package that wrote it, or start a new run with another "
            "--out."
        )
    step = state.get("step")
    if type(step) is not int or not 0 <= step < 2**63 or not all(type(k) is str for k in state):
        raise CheckpointError(_damaged(path, f"its step is {short_repr(step)}"))
    return state


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint to go on from.

    Raises:
        CheckpointError: If there is none.
    """
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"no checkpoint in {folder}: nothing to resume. Name the --out of a run, or start one "
            "without --resume."
        )
    return found[-1]


def remove_unfinished(folder: Path) -> None:
    """Removes what writers that were killed have left in a folder; nobody may write there now."""
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name) or _UNFINISHED_BEFORE.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    """Raises BadZipFile if parts would take more memory than the file, or share a name."""
    parts = archive.infolist()
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if packed or sum(part.file_size for part in parts) > size:
        raise zipfile.BadZipFile("its parts are not stored as they are")
    if len({part.filename for part in parts}) < len(parts):
        raise zipfile.BadZipFile("two of its parts have one name")


def _is(value: Any, expected: str | int) -> bool:
    return type(value) is type(expected) and value == expected


def _damaged(path: Path, reason: str) -> str:
    others = [p for p in list_checkpoints(path.parent) if p != path]
    remedy = (
        f"Remove it to go on from {others[-1].name}."
        if others
        else "Start a new run; there is no earlier checkpoint."
    )
    return f"the checkpoint {path} is damaged ({reason}). {remedy}"
