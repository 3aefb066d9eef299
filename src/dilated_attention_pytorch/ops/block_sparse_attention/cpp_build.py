"""Compiles ``cpp_forward.cpp`` with the user's own compiler at first use, and keeps the library.

The source includes no header of PyTorch, so that this takes a second or two. The library lies in
the user's cache folder under a name made from everything that it depends on; processes that build
it at the same time each put a whole file in its place.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-shared", "-fPIC",
)  # fmt: skip
# For the instructions of this very machine; not every compiler knows the first.
MACHINE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
# Set to 0, nothing is compiled or loaded.
SWITCH = "DILATED_ATTENTION_CPP"
_SECONDS = 120


def build_refusal() -> str | None:
    """Why there is no compiled library, or None if there is; builds it if need be."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        RuntimeError: If there is none; says why.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"The compiled CPU kernel cannot be had: {reason}.")
    return loaded


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library and None, or None and the reason; looked for once in a process."""
    if os.environ.get(SWITCH) == "0":
        return None, f"the environment variable {SWITCH} is 0"
    if os.name != "posix":
        return None, f"it is built on Linux and macOS alone, not on {platform.system()}"
    compiler = find_compiler()
    if compiler is None:
        return None, (
            f"there is no C++ compiler ($CXX, {', '.join(COMPILERS)}); install one "
            "(Debian: apt install g++, Fedora: dnf install gcc-c++, macOS: xcode-select --install)"
        )
    try:
        return _cached_or_built(compiler), None
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"building it with {shlex.join(compiler)} failed: {error}"


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: ``$CXX``, or the first one on the path; None: none."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        return wanted if shutil.which(wanted[0]) else None
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def cache_folder() -> Path:
    """Where libraries are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, in a folder of our own."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "dilated_attention_pytorch"


def _cached_or_built(compiler: list[str]) -> ctypes.CDLL:
    source = resources.files(__package__).joinpath("cpp_forward.cpp").read_text()
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
    ).stdout
    parts = (source, str(FLAGS), str(MACHINE_FLAGS), shlex.join(compiler), version, _machine())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] + ".so"
    try:
        return ctypes.CDLL(str(cache_folder() / name))
    except OSError:
        # Not there, or damaged.
        pass
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = _compile(compiler, source, Path(work))
            return ctypes.CDLL(str(built.replace(folder / name)))
    except OSError:
        # The cache cannot be written to, or nothing in it may be executed. A loaded library needs
        # its file no more.
        with tempfile.TemporaryDirectory() as work:
            return ctypes.CDLL(str(_compile(compiler, source, Path(work))))


def _compile(compiler: list[str], source: str, folder: Path) -> Path:
    """Compiles into a folder that nobody else uses; returns the library's path."""
    (folder / "forward.cpp").write_text(source)
    out, complaint = folder / "forward.so", ""
    for flags in MACHINE_FLAGS:
        command = [*compiler, *FLAGS, *flags, str(folder / "forward.cpp"), "-o", str(out)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if done.returncode == 0:
            return out
        complaint = complaint or done.stderr.strip()[-500:] or f"exit status {done.returncode}"
    raise OSError(complaint)


def _machine() -> str:
    """What the compiler's choice of instructions depends on: a home may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.platform()} {platform.node()}"
    names = ("flags", "Features", "model name", "CPU part", "isa")
    return "\n".join(sorted({x for x in lines if x.partition(":")[0].strip() in names}))
