"""A run's folder: who may write into it, whose it is, and its metrics."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dilated_attention_pytorch.files import write_atomically
from dilated_attention_pytorch.train.checkpoint import CheckpointError

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
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if os.name == "nt" or isinstance(error, BlockingIOError):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# Under which name a checkpoint holds it.
MARK = "mark"
_BYTES = 32


def make_mark(settings: Mapping[str, Any]) -> str | None:
    """The mark of a run with these settings; None where no key can be kept.

    A run names files: the text that it learns from, the model that it starts from. A folder that
    was fetched from elsewhere could name any file here. So every checkpoint carries a mark, made of
    the settings with a key that never leaves this account, and what an unmarked run names is read
    only if the command line names it, too.
    """
    key = _key()
    return None if key is None else _mark(key, settings)


def is_own(folder: Path, settings: Mapping[str, Any], mark: object) -> bool:
    """Whether this account made a run: the folder is its own, and so is the mark."""
    key = _key(make=False)
    if key is None or not isinstance(mark, str):
        return False
    try:
        # Without accounts, every folder is one's own; a folder of everybody's is nobody's.
        found = os.stat(folder)
        if hasattr(os, "geteuid") and (
            found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH
        ):
            return False
        own = _mark(key, settings)
    except (OSError, TypeError, ValueError, RecursionError):
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


# The one field that holds a number per layer.
PER_LAYER = "layer_sparsity"
# Bytes of a line; a thousand layers need a fiftieth.
_LONGEST = 1 << 20
# Whole numbers that a JSON reader of any language keeps.
_LARGEST_STEP = 2**53


class MetricsFile:
    """Appends one JSON object per line; every object has a ``"step"`` and else numbers or null.

    Args:
        path: The file; its folder must exist.

    Attributes:
        note: What :meth:`read` left out, in words; None: nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.note: str | None = None

    def start(self) -> None:
        """Empties the file."""
        write_atomically(self.path, b"")

    def rewind(self, step: int) -> int:
        """Drops what lies after a step, what was cut off, and what is no line of ours.

        Returns:
            Lines dropped.
        """
        if not self.path.is_file():
            self.start()
            return 0
        with open(self.path, "rb") as file:
            lines = [(line, parse_line(line)) for line in _lines(file)]
        kept = [x for x, own in lines if x.endswith(b"\n") and own and own["step"] <= step]
        write_atomically(self.path, b"".join(kept))
        return len(lines) - len(kept)

    def append(self, values: dict[str, Any]) -> None:
        """Writes one line, behind a line end if the one before was cut off."""
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        with open(self.path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)

    def sync(self) -> None:
        """Makes sure that the lines are on the disk, before a checkpoint counts on it."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All lines that are whole; :attr:`note` tells of the others. No file: no lines."""
        self.note = None
        if not self.path.is_file():
            return []
        found, odd = [], []
        with open(self.path, "rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                values = parse_line(line)
                if values is None:
                    odd.append(number)
                else:
                    found.append(values)
        if odd:
            which = f"line {odd[0]}" if len(odd) == 1 else f"{len(odd)} lines, {odd[0]} the first,"
            self.note = f"{which} of {self.path} cannot be read and is left out."
        return found


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The values of a line of metrics, or None if it is cut, damaged or something else.

    Example:
        >>> parse_line(b'{"step": 10, "loss": 2.5}'), parse_line(b'{"step": 10, "lo')
        ({'step': 10, 'loss': 2.5}, None)
    """
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    if type(step) is not int or not 0 <= step <= _LARGEST_STEP:
        return None
    for name, value in values.items():
        numbers = value if name == PER_LAYER else [value]
        if value is not None and not (isinstance(numbers, list) and all(map(_is_number, numbers))):
            return None
    return dict(values)


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= _LARGEST_STEP
    return type(value) is float and math.isfinite(value)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one that is too long, the start without one."""
    while line := file.readline(_LONGEST):
        yield line
        # The rest of it is no line of its own.
        while len(line) == _LONGEST and not line.endswith(b"\n"):
            line = file.readline(_LONGEST)
