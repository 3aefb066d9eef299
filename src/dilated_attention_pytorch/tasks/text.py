"""Real text as bytes: files to train on, files held out, and windows in a reproducible order."""

from __future__ import annotations

import codecs
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

# Tests and bundled front ends are not what anybody reads the library for.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
)
# Between two files; it occurs in no text, so a model can learn that a new file begins.
_SEPARATOR = b"\x00"
# Bytes in one read: a text is in memory once, however long its files are.
_CHUNK = 1 << 20


class TextError(ValueError):
    """The text cannot be used; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class TextData:
    """Bytes to train on and bytes held out.

    Attributes:
        train: ``(bytes,)`` uint8: the training files one after another.
        validation: ``(bytes,)`` uint8 from other files (of a single file: its last part).
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
        digest = sha256()
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.numpy().data)
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
    # A hash spreads the choice over the alphabet. It depends on the names alone, and on the place
    # where files of several folders have one name.
    # By the file system's own bytes: a name need not be UTF-8.
    named.sort(key=lambda item: (sha256(os.fsencode(item[0])).digest(), os.fsencode(item[1])))
    content, starts = _join(named, max_bytes)
    if not starts:
        raise TextError(f"no text in {source}: all files are empty. Name files with content.")
    data = _split(content, starts, validation_share, source)
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
    content = bytearray()
    for chunk in _chunks(path):
        content += chunk
    if len(content) < seq_len + 1:
        raise TextError(
            f"too little text in {path}: {len(content):,} bytes, but seq_len={seq_len} needs at "
            f"least {seq_len + 1:,}."
        )
    return torch.frombuffer(content, dtype=torch.uint8)


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
        self._starts = torch.empty(0, dtype=torch.long, device="cpu")

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
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + epoch)
        room = len(self.data) - 1 - self.per_epoch * self.seq_len
        offset = int(torch.randint(0, room + 1, (), generator=generator, device="cpu"))
        order = torch.randperm(self.per_epoch, generator=generator, device="cpu")
        self._starts, self._epoch = order * self.seq_len + offset, epoch


def validation_windows(data: Tensor, seq_len: int, count: int) -> Tensor:
    """Up to ``count`` windows, evenly spread, without overlap: ``(windows, seq_len + 1)`` int64."""
    fitting = max(1, (len(data) - 1) // seq_len)
    count = min(count, fitting)
    numbers = [index * fitting // count for index in range(count)]
    return torch.stack([data[n * seq_len : n * seq_len + seq_len + 1] for n in numbers]).long()


def _files_below(folder: Path, skipped: frozenset[str] = frozenset()) -> list[Path]:
    found = []
    left_out = {"__pycache__", *skipped}
    for place, folders, names in os.walk(folder):
        # In place: os.walk then does not go down there.
        folders[:] = [x for x in folders if x not in left_out and not x.startswith(".")]
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


def text_names(paths: Sequence[str | Path]) -> dict[str, Path]:
    """A name for each text to report it by, no two alike.

    The file's name without its ending, or the paths as they were given where those are not all
    different. A text that was given twice is listed once.
    """
    given = {str(path): Path(path) for path in paths}
    short = {path.stem: path for path in given.values()}
    return short if len(short) == len(given) else given


def read_text(path: str | Path) -> Iterator[str]:
    """The text of a file, or of the files below a folder in order, part by part.

    Bad bytes are replaced, and an empty line comes between two files.

    Raises:
        TextError: If it does not exist or cannot be read.
    """
    between = ""
    for _, file in _named_files([path]):
        yield between
        yield from decode(_chunks(file))
        between = "\n\n"


def decode(parts: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 that is cut anywhere, as text; bad bytes are replaced."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for part in parts:
        yield decoder.decode(part)
    yield decoder.decode(b"", final=True)


def byte_parts(data: Tensor) -> Iterator[bytes]:
    """The bytes of a uint8 tensor, some at a time."""
    for part in data.split(_CHUNK):
        yield part.numpy().tobytes()


def _chunks(path: Path, limit: int | None = None) -> Iterator[bytes]:
    """A file's bytes, some at a time, up to a limit."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK if limit is None else min(_CHUNK, limit)):
                yield chunk
                if limit is not None:
                    limit -= len(chunk)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TextError(f"cannot read the text {path}: {reason}. Check its permissions.") from error


def _join(
    named: Sequence[tuple[str, Path]], max_bytes: int | None
) -> tuple[bytearray, list[tuple[str, int]]]:
    """All bytes, with separators, and where each file that is not empty begins."""
    content, starts, left = bytearray(), list[tuple[str, int]](), max_bytes
    for name, path in named:
        if left == 0:
            break
        before = len(content)
        if starts:
            content += _SEPARATOR
        start = len(content)
        for chunk in _chunks(path, left):
            content += chunk
        if len(content) == start:
            del content[before:]
            continue
        starts.append((name, start))
        if left is not None:
            left -= len(content) - start
    return content, starts


def _split(
    content: bytearray, starts: list[tuple[str, int]], share: float, source: str
) -> TextData:
    """Training and held-out files; the first files in hash order are held out."""
    names, data = tuple(name for name, _ in starts), torch.frombuffer(content, dtype=torch.uint8)
    if len(starts) == 1:
        cut = len(data) - max(1, round(share * len(data)))
        return TextData(data[:cut], data[cut:], names, names, source)
    # Without the separators.
    goal = max(1, round(share * (len(data) - len(starts) + 1)))
    held = 1
    while held < len(starts) - 1 and starts[held][1] - held < goal:
        held += 1
    start = starts[held][1]
    return TextData(data[start:], data[: start - 1], names[held:], names[:held], source)
