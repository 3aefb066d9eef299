"""The package's safetensors files: they name format and version, and a digest of their content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dilated_attention_pytorch.file_access import read_file, replace_files
from dilated_attention_pytorch.strict_json import MAX_BYTES, parse_json, short_repr

# More than any selector or pattern needs.
MAX_FILE = 2**34
_LARGEST_SIZE = 2**40
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4,
    "F64": 8,
}  # fmt: skip


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file whose metadata hold a digest of everything in it.

    Args:
        tensors: On any device; parts of others, and the same one twice, are written as copies.
        metadata: Strings, without a ``"digest"``.
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
    """Writes such a file: whole, or not at all.

    Raises:
        OSError: If it cannot be written; a file that was there is as before.
    """
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
    ranges = sorted(_range(own, about, name) for own, about in tensors)
    place = 0
    for begin, end in ranges:
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
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"{where} a dtype of {sorted(_ITEM_BYTES)}, got {short_repr(dtype)}.")
    if not _sizes(shape) or len(shape) > 8 or math.prod(max(x, 1) for x in shape) > _LARGEST_SIZE:
        raise ValueError(f"{where} a shape of at most 8 sizes, got {short_repr(shape)}.")
    if not _sizes(place) or len(place) != 2:
        raise ValueError(f"{where} two offsets, got {short_repr(place)}.")
    if place[1] - place[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{where} as many bytes as its shape {shape} takes, got {place}.")
    return place[0], place[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


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
