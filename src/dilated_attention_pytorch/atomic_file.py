"""Files that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from pathlib import Path

# Names of files that are being written: nobody can foresee them, and what a writer that was killed
# has left can be told from all else.
UNFINISHED = re.compile(r"\.dilated-attention-[0-9a-f]{16}\.tmp")
# What a system answers that cannot flush a folder: then there is nothing to wait for.
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def write_atomically(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Replaces a file by new content: a reader, or a crash, sees the old or the new one.

    The content goes to a file of an unforeseeable name beside it, which must not exist before, is
    flushed to the disk and then renamed; the folder is flushed last. On any error that file is
    removed and the old content stays. A symbolic link is replaced, not followed.

    Args:
        path: The file; its folder must exist.
        content: All of it.
        mode: Permissions. None: those of the file that is replaced, or what the umask allows.

    Raises:
        OSError: If it cannot be written, or if ``path`` is a folder or a device.
    """
    own = _mode_of(path)
    temporary = unfinished_name(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    # Windows has neither, and tells text from bytes.
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
    try:
        with open(descriptor, "wb") as file:
            wanted = own if mode is None else mode
            if wanted is not None and hasattr(os, "fchmod"):
                os.fchmod(descriptor, wanted)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        # What went wrong is worth more to the caller than that it left a file.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def unfinished_name(path: Path) -> Path:
    """A name beside a path that nobody can foresee, for what is not finished."""
    return path.with_name(f".dilated-attention-{secrets.token_hex(8)}.tmp")


def _mode_of(path: Path) -> int | None:
    """Permissions of the file that is replaced; None: there is none, or a link.

    Raises:
        OSError: If what is there is no file.
    """
    try:
        found = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found):
        return None
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
    return stat.S_IMODE(found) & 0o777


def sync_folder(folder: Path) -> None:
    """Makes sure that the names in a folder survive a power cut, where the system can."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        # One may be allowed to write into a folder and not to read it.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)
