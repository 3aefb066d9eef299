"""Reading files that may be anything, and writing several of them as if they were one."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dilated_attention_pytorch.atomic_file import sync_folder, unfinished_name, write_atomically

# Absent on Windows, where there is nothing to wait for.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_file(path: str | Path, *, limit: int) -> bytes:
    """All bytes of an ordinary file, whose size is looked at first; never waits for a pipe.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a folder, a pipe or a device, is larger, or cannot be read.
    """
    if "\0" in str(path):
        raise ValueError(f"the name of a file must not hold a zero byte, got {str(path)!r}.")
    try:
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}.") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{path} must be an ordinary file, not a folder, pipe or device.")
        if about.st_size > limit:
            raise ValueError(
                f"{path} must have at most {limit:,} bytes to be of its kind, got "
                f"{about.st_size:,}."
            )
        content = bytearray(about.st_size)
        done = 0
        with memoryview(content) as view, os.fdopen(descriptor, "rb", closefd=False) as file:
            while done < len(content) and (count := file.readinto(view[done:])):
                done += count
        if done < len(content):
            raise ValueError(f"{path} became shorter while it was read; read it again.")
        return bytes(content)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Writes files that belong together: after an error all of them are as they were before.

    Each is replaced whole. A machine that stops in between may leave new files beside old ones;
    what reads them must be able to tell.

    Args:
        contents: By path; the folders exist.

    Raises:
        OSError: If something cannot be written; nothing has changed then.
    """
    before: dict[Path, Path | None] = {}
    try:
        for path, content in contents.items():
            before[path] = _kept(path)
            write_atomically(path, content)
    except BaseException:
        for path, old in before.items():
            if old is None:
                path.unlink(missing_ok=True)
            else:
                os.replace(old, path)
        raise
    finally:
        for old in before.values():
            if old is not None:
                old.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of another one when all went well.

    Args:
        folder: Where it goes. Until the block ends without an error it stays as it is.

    Yields:
        An empty folder beside it.

    Raises:
        OSError: If it cannot be made or put there; the old one is then in its place.
    """
    new, old = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "before"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # What a machine that stopped in between has left.
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for path in sorted(new.rglob("*")):
            if path.is_file():
                _sync(path)
        exists = os.path.lexists(folder)
        if exists:
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except BaseException:
            if exists:
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)


def _kept(path: Path) -> Path | None:
    """Another name for what a path holds; None if it holds nothing."""
    if not os.path.lexists(path):
        return None
    other = unfinished_name(path)
    try:
        os.link(path, other, follow_symlinks=False)
    except (OSError, NotImplementedError):
        # Not every file system has second names.
        shutil.copy2(path, other, follow_symlinks=False)
    return other


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
