"""Tells a run of this account from one that somebody else made.

A run names files: the text that it learns from, the model that it starts from. A folder that was
fetched from elsewhere could name any file here. So every checkpoint carries a mark, made of the
settings with a key that never leaves this account, and what an unmarked run names is read only if
the command line names it, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.training.checkpoint import CheckpointError

# Under which name a checkpoint holds it.
MARK = "mark"
_BYTES = 32


def make_mark(settings: Mapping[str, Any]) -> str | None:
    """The mark of a run with these settings; None where no key can be kept."""
    key = _key()
    return None if key is None else _mark(key, settings)


def is_own(folder: Path, settings: Mapping[str, Any], mark: object) -> bool:
    """Whether this account made a run: the folder is its own, and so is the mark."""
    key = _key(make=False)
    if key is None or not isinstance(mark, str) or not _belongs_here(folder):
        return False
    try:
        own = _mark(key, settings)
    except (TypeError, ValueError, RecursionError):
        # Settings that JSON cannot hold are not ours.
        return False
    return hmac.compare_digest(own.encode(), mark.encode("utf-8", "replace"))


def check_named(
    folder: Path, settings: Mapping[str, Any], mark: object, missing: Iterable[str]
) -> None:
    """Raises CheckpointError if a run is not this account's and does not name its files here.

    Args:
        folder: Of the run.
        settings: Of the run.
        mark: That its checkpoint carries.
        missing: Options that name files and that the command line leaves out.
    """
    unnamed = [f"--{name}" for name in missing]
    if unnamed and not is_own(folder, settings, mark):
        raise CheckpointError(
            f"{folder} was not made by this account on this machine, so the files that it names "
            f"are not read. Name them: {' '.join(unnamed)}."
        )


def _mark(key: bytes, settings: Mapping[str, Any]) -> str:
    words = json.dumps(settings, sort_keys=True)
    return hmac.new(key, words.encode(), hashlib.sha256).hexdigest()


def _belongs_here(folder: Path) -> bool:
    """Whether the folder is this account's and not everybody's; without accounts, it is."""
    if not hasattr(os, "geteuid"):
        return True
    try:
        found = os.stat(folder)
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & stat.S_IWOTH


def _key_path() -> Path | None:
    base = os.environ.get("XDG_STATE_HOME", "")
    try:
        # The standard of these variables: what is relative does not count.
        place = Path(base) if os.path.isabs(base) else Path("~/.local/state").expanduser()
    except RuntimeError:
        # No HOME, and no account that has one.
        return None
    return place / "dilated_attention_pytorch" / "key" if place.is_absolute() else None


def _key(*, make: bool = True) -> bytes | None:
    """The account's key; None where there is none and none can be kept."""
    path = _key_path()
    if path is None:
        return None
    with contextlib.suppress(OSError):
        if make and not path.exists():
            _make_key(path)
        return _read_key(path)
    return None


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(f".key-{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(descriptor)
        # Of two that make one at the same time, the first stays: unlike a rename, a link never
        # replaces.
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)


def _read_key(path: Path) -> bytes | None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        private = not hasattr(os, "geteuid") or (
            found.st_uid == os.geteuid() and not found.st_mode & 0o077
        )
        key = file.read(_BYTES + 1)
    return key if private and stat.S_ISREG(found.st_mode) and len(key) == _BYTES else None
