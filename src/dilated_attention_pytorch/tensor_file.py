"""Reading the package's safetensors files, which name their format and version."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def read_tensor_file(
    path: str | Path, *, kind: str, file_format: str, version: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its metadata (needs the ``safetensors`` package).

    Args:
        path: The file.
        kind: What it holds, in words, for errors: ``"a block pattern"``.
        file_format: What its metadata must name as ``format``.
        version: What they must name as ``version``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else or of another version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no pattern file at {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
    if metadata.get("format") != file_format or metadata.get("version") != version:
        raise ValueError(
            f"{path} must be {kind} of version {version}, got format={metadata.get('format')!r} "
            f"version={metadata.get('version')!r}."
        )
    return tensors, metadata
