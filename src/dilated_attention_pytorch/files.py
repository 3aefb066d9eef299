"""Files replaced whole or not at all, files that may be anything, and safetensors with a digest."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dilated_attention_pytorch.foreign_text import MAX_BYTES, parse_json, short_repr

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
        _flush(folder)
    except PermissionError:
        # One may be allowed to write into a folder and not to read it.
        return
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Absent on Windows, where there is nothing to wait for.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_file(path: str | Path, *, limit: int) -> bytes:
    """All bytes of an ordinary file of at most ``limit``; never waits for a pipe.

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
    """Yields an empty folder to fill, which takes a folder's place when the block ends well.

    Until then, and after every error, the old folder is in its place.
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
                _flush(path)
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


# More than any selector or pattern needs.
MAX_FILE = 2**34
_LARGEST_SIZE = 2**40
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4,
    "F64": 8,
}  # fmt: skip


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file whose metadata hold a digest of everything in it.

    Tensors may be on any device; parts of others, and the same one twice, are written as copies.
    """
    from safetensors.torch import save

    # Two names of one memory would be refused.
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    tensors_alone, data = _split(save(own), "the new file")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items())), **tensors_alone}
    header["__metadata__"]["digest"] = _digest(header, data)
    # The library writes metadata in an order of chance: the same content must give the same bytes.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, data))


def write_tensor_file(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a file of :func:`tensor_bytes` whole, or not at all."""
    replace_files({Path(path): tensor_bytes(tensors, metadata)})


def parse_tensors(
    content: bytes, name: str, *, required: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, all checked before anything is made.

    Args:
        content: Of the file.
        name: Its path, for errors.
        required: Whether there must be a digest; files of earlier versions have none.

    Raises:
        ValueError: If it is damaged, or no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    header, data = _split(content, name)
    metadata: dict[str, str] = header.get("__metadata__", {})
    digest = metadata.get("digest")
    if digest is None and required:
        raise ValueError(f"{name} has no digest of its content: it is not as it was written.")
    if digest is not None and digest != _digest(header, data):
        raise ValueError(f"{name} is not as it was written: content and digest do not fit.")
    try:
        return load(content), metadata
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{name} is not a readable safetensors file: {error}.") from error


def read_tensor_file(
    path: str | Path, *, kind: str, file_format: str, versions: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and what it says about them (needs the ``safetensors`` package).

    Args:
        path: The file.
        kind: What it holds, in words, for errors: ``"a block pattern"``.
        file_format: What its metadata must name as ``format``.
        versions: What they may name as ``version``. The first has no digest; later ones must.

    Returns:
        The tensors, and the JSON object that the metadata hold as ``about``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else or of another version.
    """
    try:
        content = read_file(path, limit=MAX_FILE)
    except FileNotFoundError:
        raise FileNotFoundError(f"no pattern file at {path}.") from None
    tensors, metadata = parse_tensors(content, str(path))
    version = metadata.get("version")
    if metadata.get("format") != file_format or version not in versions:
        raise ValueError(
            f"{path} must be {kind} of version {' or '.join(versions)}, got "
            f"format={short_repr(metadata.get('format'))} version={short_repr(version)}."
        )
    if version != versions[0] and "digest" not in metadata:
        raise ValueError(
            f"{path} is of version {version}, but has no digest of its content: it is not as it "
            "was written."
        )
    # Strings of a checked header are text.
    about = parse_json(
        metadata.get("about", "").encode(), f"missing or unreadable: what {path} says about itself"
    )
    if not isinstance(about, dict):
        raise ValueError(
            f"missing or unreadable: what {path} says about itself must be a JSON object, got "
            f"{short_repr(about)}."
        )
    return tensors, about


def _split(content: bytes, name: str) -> tuple[dict[str, Any], memoryview]:
    """The header, checked, and the bytes of the tensors."""
    if len(content) < 8:
        raise ValueError(f"{name} is not a readable safetensors file: it has no header.")
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content) - 8, MAX_BYTES):
        raise ValueError(
            f"{name} is not a readable safetensors file: its header would have {length:,} bytes."
        )
    header = parse_json(content[8 : 8 + length], f"the header of {name}")
    data = memoryview(content)[8 + length :]
    if not isinstance(header, dict):
        raise ValueError(f"the header of {name} must be a JSON object, got {short_repr(header)}.")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError(f"the metadata in the header of {name} must be strings.")
    tensors = [(own, about) for own, about in header.items() if own != "__metadata__"]
    place = 0
    for begin, end in sorted(_range(own, about, name) for own, about in tensors):
        if begin != place:
            raise ValueError(f"the header of {name} leaves gaps between tensors, or overlaps them.")
        place = end
    if place != len(data):
        raise ValueError(
            f"the header of {name} describes {place:,} bytes of tensors, but there are "
            f"{len(data):,}: the file was cut or mixed up."
        )
    return header, data


def _range(tensor: str, about: Any, name: str) -> tuple[int, int]:
    """First and last byte of a tensor, which must be as many as its shape takes."""
    where = f"the header of {name} must describe the tensor {short_repr(tensor)} by"
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} dtype, shape and data_offsets.")
    shape, place, dtype = about["shape"], about["data_offsets"], about["dtype"]

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)

    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"{where} a dtype of {sorted(_ITEM_BYTES)}, got {short_repr(dtype)}.")
    if not sizes(shape) or len(shape) > 8 or math.prod(max(x, 1) for x in shape) > _LARGEST_SIZE:
        raise ValueError(f"{where} a shape of at most 8 sizes, got {short_repr(shape)}.")
    if not sizes(place) or len(place) != 2:
        raise ValueError(f"{where} two offsets, got {short_repr(place)}.")
    if place[1] - place[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{where} as many bytes as its shape {shape} takes, got {place}.")
    return place[0], place[1]


def _digest(header: Mapping[str, Any], data: memoryview) -> str:
    """SHA-256 of metadata (but the digest) and tensors, whatever order they are written in."""
    metadata = {k: v for k, v in header.get("__metadata__", {}).items() if k != "digest"}
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(set(header) - {"__metadata__"}):
        about = header[name]
        begin, end = about["data_offsets"]
        digest.update(json.dumps([name, about["dtype"], about["shape"]]).encode())
        digest.update(data[begin:end])
    return digest.hexdigest()
