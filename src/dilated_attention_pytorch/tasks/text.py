"""Real text as bytes: files to train on, files held out, and windows in a reproducible order."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Tests and bundled front ends are not what anybody reads the library for.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
)
# Between two files; it occurs in no text, so a model can learn that a new file begins.
_SEPARATOR = b"\x00"


class TextError(ValueError):
    """The text cannot be used; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class TextData:
    """Bytes to train on and bytes held out.

    Attributes:
        train: ``(bytes,)`` uint8: the training files one after another.
        validation: Likewise, from other files (of a single file: its last part).
        train_files: Names of the training files, in order.
        validation_files: Names of the held-out files.
        source: What the text is, in words.
    """

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    source: str

    def fingerprint(self) -> str:
        """SHA-256 of both parts: the same text gives the same one."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


def standard_library_files() -> list[Path]:
    """The Python standard library's own sources, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in _files_below(root, _SKIPPED_FOLDERS) if path.suffix == ".py"]


def load_text(
    paths: Sequence[str | Path] | None = None,
    *,
    validation_share: float = 0.05,
    max_bytes: int | None = None,
    seq_len: int = 1,
) -> TextData:
    """Reads text, as bytes, and holds some of it out.

    Whole files are held out, picked by a hash of their names: the same files on every run, spread
    over all folders. Of a single file, the last part is held out.

    Args:
        paths: Files, or folders to read with all below (hidden files and ``__pycache__`` are left
            out). None: the Python standard library's sources.
        validation_share: Share of the bytes to hold out, in (0, 0.5].
        max_bytes: Stop after as many bytes (spread over the files, not the first ones). None: all.
        seq_len: Bytes of a window; the text must hold at least one in each part.

    Raises:
        TextError: If a path does not exist or cannot be read, or there is too little text.
        ValueError: If a number is out of range.
    """
    if not 0 < validation_share <= 0.5:
        raise ValueError(f"validation_share must lie in (0, 0.5], got {validation_share}.")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}.")
    if paths is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        named = [(str(p.relative_to(root)), p) for p in standard_library_files()]
        source = "the Python standard library's sources"
    else:
        named = list(_named_files(paths))
        source = ", ".join(str(path) for path in paths)
    contents = [(name, _read(path)) for name, path in named]
    contents = [(name, content) for name, content in contents if content]
    if not contents:
        raise TextError(f"no text in {source}: all files are empty. Name files with content.")
    # A hash spreads the choice over the alphabet; it depends on the names alone.
    # A name may hold bytes that are no UTF-8.
    contents.sort(
        key=lambda item: hashlib.sha256(item[0].encode("utf-8", "surrogateescape")).digest()
    )
    if max_bytes is not None:
        contents = _limit(contents, max_bytes)
    train, validation = _split(contents, validation_share)
    data = TextData(
        _join(train),
        _join(validation),
        tuple(name for name, _ in train),
        tuple(name for name, _ in validation),
        source,
    )
    for part, what in ((data.train, "training"), (data.validation, "validation")):
        if len(part) < seq_len + 1:
            raise TextError(
                f"too little text in {source}: the {what} part has {len(part):,} bytes, but "
                f"seq_len={seq_len} needs at least {seq_len + 1:,}. Give more text or a smaller "
                f"sequence length{'' if part is data.train else ', or hold more out'}."
            )
    return data


def read_bytes(path: Path, seq_len: int) -> Tensor:
    """All bytes of one file, ``(bytes,)`` uint8.

    Raises:
        TextError: If it cannot be read or holds less than ``seq_len + 1`` bytes.
    """
    if not path.is_file():
        raise TextError(f"no such text: {path}. Name a file that exists.")
    content = _read(path)
    if len(content) < seq_len + 1:
        raise TextError(
            f"too little text in {path}: {len(content):,} bytes, but seq_len={seq_len} needs at "
            f"least {seq_len + 1:,}."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class TextWindows:
    """Windows of the training bytes, every byte once per epoch, in an order that a seed fixes.

    The order is a function of the seed and the epoch, so :attr:`position` alone is enough to go
    on exactly.

    Args:
        data: Bytes, ``(bytes,)`` uint8.
        seq_len: Bytes that the model reads; a window holds one more.
        seed: Of the order.
    """

    def __init__(self, data: Tensor, seq_len: int, seed: int) -> None:
        if seq_len < 1 or len(data) < seq_len + 1:
            raise ValueError(
                f"seq_len must lie in [1, {len(data) - 1}] for {len(data)} bytes, got {seq_len}."
            )
        self.data, self.seq_len, self.seed = data, seq_len, seed
        self.position = 0
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.long)

    @property
    def per_epoch(self) -> int:
        """Windows in an epoch."""
        # One window less than fits leaves room for an offset that differs between epochs.
        return max(1, (len(self.data) - 1) // self.seq_len - 1)

    def next_batch(self, size: int) -> Tensor:
        """The next ``size`` windows, ``(size, seq_len + 1)`` int64; moves :attr:`position`."""
        starts = []
        for _ in range(size):
            epoch, number = divmod(self.position, self.per_epoch)
            if epoch != self._epoch:
                self._shuffle(epoch)
            starts.append(int(self._starts[number]))
            self.position += 1
        return torch.stack([self.data[s : s + self.seq_len + 1] for s in starts]).long()

    def _shuffle(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        room = len(self.data) - 1 - self.per_epoch * self.seq_len
        offset = int(torch.randint(0, room + 1, (), generator=generator))
        order = torch.randperm(self.per_epoch, generator=generator)
        self._starts, self._epoch = order * self.seq_len + offset, epoch


def validation_windows(data: Tensor, seq_len: int, count: int) -> Tensor:
    """Up to ``count`` windows, evenly spread, without overlap: ``(windows, seq_len + 1)`` int64."""
    fitting = max(1, (len(data) - 1) // seq_len)
    count = min(count, fitting)
    numbers = [index * fitting // count for index in range(count)]
    return torch.stack([data[n * seq_len : n * seq_len + seq_len + 1] for n in numbers]).long()


def _files_below(folder: Path, skipped: frozenset[str] = frozenset()) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        # In place: os.walk then does not go down there.
        folders[:] = [
            name
            for name in folders
            if name != "__pycache__" and name not in skipped and not name.startswith(".")
        ]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    files = [path for path in found if path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _named_files(paths: Sequence[str | Path]) -> Iterator[tuple[str, Path]]:
    seen = set()
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise TextError(f"no such text: {path}. Name files or folders that exist.")
        files = [path] if path.is_file() else _files_below(path)
        if not files:
            raise TextError(f"the folder {path} holds no files. Name one that holds text.")
        for file in files:
            real = file.resolve()
            # The same file named twice must not be trained on and held out.
            if real not in seen:
                seen.add(real)
                yield str(file if path.is_file() else file.relative_to(path)), file


def read_text(path: str | Path) -> str:
    """All text of a file, or of the files below a folder, in order; bad bytes are replaced.

    Raises:
        TextError: If it does not exist or cannot be read.
    """
    contents = [_read(file) for _, file in _named_files([path])]
    return "\n\n".join(content.decode("utf-8", "replace") for content in contents)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TextError(f"cannot read the text {path}: {reason}. Check its permissions.") from error


def _limit(contents: list[tuple[str, bytes]], max_bytes: int) -> list[tuple[str, bytes]]:
    kept, left = [], max_bytes
    for name, content in contents:
        if left <= 0:
            break
        kept.append((name, content[:left]))
        left -= len(content)
    return kept


def _split(
    contents: list[tuple[str, bytes]], share: float
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """Training and held-out files; the first files in hash order are held out."""
    goal = max(1, round(share * sum(len(content) for _, content in contents)))
    if len(contents) == 1:
        name, content = contents[0]
        cut = len(content) - goal
        return [(name, content[:cut])], [(name, content[cut:])]
    held, size = 0, 0
    while size < goal and held < len(contents) - 1:
        size += len(contents[held][1])
        held += 1
    return contents[held:], contents[:held]


def _join(contents: list[tuple[str, bytes]]) -> Tensor:
    joined = _SEPARATOR.join(content for _, content in contents)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)
