"""Keeps a second command out of a folder that one writes into."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".lock"
# What a file system answers that has no locks, as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderInUseError(RuntimeError):
    """Another command writes into the folder; the message names it and what to do."""


@contextmanager
def lock_folder(folder: Path, *, create: bool = True) -> Iterator[bool]:
    """Holds a folder for the one who writes into it.

    The system itself holds the lock (``flock`` on ``.lock`` in the folder) and releases it however
    the process ends, ``kill -9`` among them. Two threads exclude each other as two processes do.
    What reads alone needs no lock.

    Args:
        folder: To hold.
        create: Make the folder if there is none, and remove it again if it stays empty. False:
            where there is no folder, nothing is held.

    Yields:
        Whether the folder is held; False where the file system has no locks or, with
        ``create=False``, where there is no folder.

    Raises:
        FolderInUseError: If another process or thread holds it.
        OSError: If the folder or the file in it cannot be made.

    Example:
        >>> import tempfile
        >>> with lock_folder(Path(tempfile.mkdtemp()) / "run") as held:
        ...     held
        True
    """
    made: list[Path] = []
    if not folder.is_dir():
        if not create:
            yield False
            return
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _held(folder) as held:
            yield held
    finally:
        # Of a command that was refused nothing stays.
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    path = folder / LOCK_NAME
    while True:
        descriptor = _open(path)
        try:
            locked = _lock(descriptor)
            if locked is False:
                raise FolderInUseError(
                    f"another command writes into {folder}: wait until it has ended, or choose "
                    "another --out."
                )
            # The one before removes the file when it is done: a lock on a file that has no name
            # any more would keep nobody out.
            if not _is_at(path, descriptor):
                continue
            try:
                yield bool(locked)
            finally:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT
    # Not followed: whoever made the folder must not choose which file is made.
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise OSError(
            error.errno,
            f"cannot lock the folder {path.parent} ({path.name}: {reason}); remove that file, or "
            "choose another --out",
        ) from error


def _lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None: the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return _lock_bytes(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _lock_bytes(descriptor: int) -> bool:
    """The same on Windows."""
    import msvcrt

    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
