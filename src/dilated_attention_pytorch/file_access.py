"""Reading files that may be anything, and writing several of them as if they were one."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Absent on Windows, where there is nothing to wait for.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_WRITE = (
    os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
)


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

    Each is written beside its place, and put there when all are on the disk. A machine that stops
    in between may leave new files beside old ones; what reads them must be able to tell.

    Args:
        contents: By path; the folders exist.

    Raises:
        OSError: If something cannot be written; nothing has changed then.
    """
    staged = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    aside = {path: path.with_name(f".{path.name}.{os.getpid()}.before.tmp") for path in contents}
    placed: list[Path] = []
    try:
        for path, temporary in staged.items():
            _write(temporary, contents[path])
        for path, temporary in staged.items():
            _keep(path, aside[path])
            placed.append(path)
            os.replace(temporary, path)
    except BaseException:
        for path in placed:
            if os.path.lexists(aside[path]):
                os.replace(aside[path], path)
            elif not os.path.lexists(staged[path]):
                path.unlink(missing_ok=True)
        raise
    finally:
        for temporary in (*staged.values(), *aside.values()):
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in contents}:
        _sync_folder(folder)


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
        os.rename(old, folder)
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
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            if exists:
                os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    _sync_folder(folder.parent)


def _write(path: Path, content: bytes) -> None:
    # A process of this number that was killed may have left it.
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, _WRITE, 0o666), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _keep(path: Path, aside: Path) -> None:
    """Keeps what a path holds under another name."""
    aside.unlink(missing_ok=True)
    if not os.path.lexists(path):
        return
    try:
        os.link(path, aside, follow_symlinks=False)
    except (OSError, NotImplementedError):
        # Not every file system has second names.
        shutil.copy2(path, aside, follow_symlinks=False)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    # The new names must survive a power cut; not every system can open a folder.
    if os.name == "posix":
        _sync(folder)
