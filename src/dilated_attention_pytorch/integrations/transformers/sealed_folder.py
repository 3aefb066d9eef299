"""Folders in the formats of transformers and peft that say what their files were when written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.files import read_file, replace_files
from dilated_attention_pytorch.foreign_text import (
    MAX_BYTES,
    parse_json,
    sealed,
    short_repr,
    unsealed,
)

DIGESTS_NAME = "digests.json"
_FORMAT = "dilated_attention_pytorch.folder"


def seal_folder(folder: Path) -> None:
    """Writes a digest of every file of a folder into it."""
    files = {
        path.name: _digest(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != DIGESTS_NAME
    }
    text = json.dumps(sealed({"format": _FORMAT, "version": 1, "files": files}), indent=2) + "\n"
    replace_files({folder / DIGESTS_NAME: text.encode()})


def check_sealed(folder: Path) -> None:
    """Raises ValueError if a file is not as it was when the folder was sealed.

    A folder that was never sealed, and files that were added since, pass.
    """
    place = folder / DIGESTS_NAME
    try:
        content = read_file(place, limit=MAX_BYTES)
    except FileNotFoundError:
        return
    about = unsealed(parse_json(content, str(place)), str(place), required=True)
    files = about.get("files", {})
    if about.get("format") != _FORMAT or about.get("version") != 1 or not _are_digests(files):
        raise ValueError(f"{place} must hold the digests of files, got {short_repr(about)}.")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise ValueError(
                f"{path} is not as it was written: it is missing, or its content and the digest in "
                f"{DIGESTS_NAME} do not fit. Copy the folder again; remove {DIGESTS_NAME} if you "
                "changed the file yourself."
            )


def local_settings(folder: str | Path, name: str) -> dict[str, Any]:
    """Settings of a folder, which must be here; the Hub is never asked, and no code is run.

    Args:
        folder: A folder of transformers or peft.
        name: Of the JSON file, such as ``"config.json"``.

    Raises:
        ValueError: If there is no such folder or file, it is damaged, or names code to run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}. Name one on this machine; what is on the Hub must be "
            "downloaded first."
        )
    try:
        content = read_file(folder / name, limit=MAX_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {name}.") from None
    settings = parse_json(content, str(folder / name), foreign=True)
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / name} must hold a JSON object, got {short_repr(settings)}.")
    for key in ("auto_map", "trust_remote_code"):
        if settings.get(key):
            raise ValueError(
                f"{folder / name} names code of its own ({key}), which is never run. Where "
                "transformers knows the architecture, remove that entry."
            )
    return settings


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _are_digests(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(digest, str) and Path(name).name == name for name, digest in files.items()
    )
