"""The texts of ``pretrained.py``: which for what, packing to carry them, pieces to train on."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fetch_smollm2 import CACHE, GGUF_NAME, convert

RUNS = CACHE / "pretrained"
MODEL = CACHE / "smollm2"
TRAINED_ON = (
    "cfi-en", "debian-handbook", "debian-reference-en", "git-doc", "jargon-text", "linux-doc-6.1",
    "moby-dick", "perl-doc", "r-cran-janeaustenr", "state-of-the-union", "stdlib",
)  # fmt: skip
MEASURED_ON = ("anarchism", "python3.11-doc")
# Bytes of each text. Of what is measured the rest would only cost time; of manuals and code there
# would be more to train on than of prose.
TEXT_BYTES = {
    "linux-doc-6.1": 4_000_000, "perl-doc": 3_000_000, "stdlib": 4_000_000,
    "anarchism": 3_000_000, "python3.11-doc": 3_000_000,
}  # fmt: skip


def pack() -> None:
    """Model in two folders and texts in a third, of less than 50 MiB each."""
    parts = CACHE / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    content = (CACHE / GGUF_NAME).read_bytes()
    half = len(content) // 2
    for name, piece in (("a", content[:half]), ("b", content[half:])):
        (parts / name).mkdir(parents=True)
        (parts / name / "model.part").write_bytes(piece)
    (parts / "c").mkdir()
    for name in (*TRAINED_ON, *MEASURED_ON):
        text = (CACHE / "texts" / f"{name}.txt").read_bytes()[: TEXT_BYTES.get(name)]
        (parts / "c" / f"{name}.txt.xz").write_bytes(lzma.compress(text))
    # Reading the model's file needs this one pure Python package.
    wheels = parts / "c" / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
         "--disable-pip-version-check", "--dest", str(wheels), "gguf"],
        check=True,
    )  # fmt: skip
    for name in ("a", "b", "c"):
        size = sum(p.stat().st_size for p in (parts / name).rglob("*") if p.is_file())
        print(f"{parts / name}: {size / 2**20:.1f} MiB")


def unpack() -> None:
    """Joins the folders and converts the model; needs no network."""
    parts = CACHE / "parts"
    gguf = CACHE / GGUF_NAME
    gguf.write_bytes(b"".join((parts / x / "model.part").read_bytes() for x in ("a", "b")))
    (CACHE / "texts").mkdir(exist_ok=True)
    for packed in parts.glob("*/*.txt.xz"):
        (CACHE / "texts" / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    for wheel in (parts / "c" / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(CACHE / "python")
    sys.path.append(str(CACHE / "python"))
    print(convert(gguf, MODEL))


def text_paths(names: tuple[str, ...]) -> tuple[str, ...]:
    """Where the texts lie."""
    return tuple(str(CACHE / "texts" / f"{name}.txt") for name in names)


def training_texts() -> tuple[str, ...]:
    """The texts to train on in pieces of 100,000 characters: held-out text is whole files."""
    about = json.dumps([TRAINED_ON, TEXT_BYTES]).encode()
    folder = RUNS / f"train-{hashlib.sha256(about).hexdigest()[:8]}"
    if not folder.is_dir():
        RUNS.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=RUNS))
        for name, path in zip(TRAINED_ON, text_paths(TRAINED_ON), strict=True):
            text = Path(path).read_bytes()[: TEXT_BYTES.get(name)].decode("utf-8", "replace")
            for number, start in enumerate(range(0, len(text), 100_000)):
                piece = made / f"{name}-{number:03}.txt"
                piece.write_text(text[start : start + 100_000], encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            # Another process, on another GPU, was faster.
            shutil.rmtree(made)
    return (str(folder),)
