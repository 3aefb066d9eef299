"""The compiled CPU kernel as an operator; its gradients are those of the PyTorch path.

The user's own compiler builds it at first use, and the library is kept; in it are also what rates
blocks by low-rank products, the attention of new tokens, and the choice of their blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import selectors
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.files import write_atomically
from dilated_attention_pytorch.mask import document_bounds
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments
from dilated_attention_pytorch.ops.block_sparse_attention.gather import (
    backward,
    backward_op,
    flatten,
    setup_context,
    unflatten,
)
from dilated_attention_pytorch.ops.operators import (
    NAMESPACE,
    differentiable,
    empty_results,
    rows_of,
)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-shared", "-fPIC",
)  # fmt: skip
# For the instructions of this very machine; not every compiler knows the first.
MACHINE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
# One program, in this order; and what it offers.
SOURCES = (
    "block_sparse_attention/cpp_forward.cpp", "block_selection/cpp_low_rank.cpp",
    "block_sparse_decode/cpp_decode.cpp", "block_selection/cpp_newest.cpp",
)  # fmt: skip
_OFFERED = ("block_sparse_forward", "low_rank_masses", "block_sparse_decode", "list_newest")
# Set to 0, nothing is compiled or loaded.
SWITCH = "DILATED_ATTENTION_CPP"
# A compile takes two; a slow machine needs ten times as long.
_SECONDS = 60
# Bytes of what the compiler prints that are read.
_SHOWN = 10_000
# Bytes of a library; ours has a hundredth.
_LARGEST = 1 << 24
# Seconds between two looks at it.
_PAUSE = 0.1


def build_failure() -> str | None:
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
    try:
        compiler = find_compiler()
    except ValueError as error:
        return None, f"the environment variable CXX is no command: {error}"
    if compiler is None:
        return None, (
            f"there is no C++ compiler ($CXX, {', '.join(COMPILERS)}); install one "
            "(Debian: apt install g++, Fedora: dnf install gcc-c++, macOS: xcode-select --install)"
        )
    try:
        return _cached_or_built(compiler), None
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return None, f"building it with {shlex.join(compiler)} failed: {error}"


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: ``$CXX``, or the first one on the path; None: none.

    Raises:
        ValueError: If ``$CXX`` has a quote that does not end.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        return wanted if shutil.which(wanted[0]) else None
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def cache_folder() -> Path | None:
    """Where libraries are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, in a folder of our own.

    A variable that holds no absolute path does not count. None: there is no such place, as for an
    account without a home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path("~/.cache").expanduser()
        except RuntimeError:
            return None
    return base / "dilated_attention_pytorch" if base.is_absolute() else None


def _cached_or_built(compiler: list[str]) -> ctypes.CDLL:
    source = read_sources()
    version = _run_compiler([*compiler, "--version"]).output
    parts = (source, str(FLAGS), str(MACHINE_FLAGS), shlex.join(compiler), version, _machine())
    words = "\0".join(parts).encode("utf-8", "backslashreplace")
    key = hashlib.sha256(words).hexdigest()[:32]
    cache = _own_cache()
    for path in sorted(cache.glob(f"{key}-*.so")) if cache is not None else ():
        content = _intact(path)
        if content is not None:
            with contextlib.suppress(OSError):
                return _open(content, cache)
    content = _built(compiler, source, cache)
    if cache is not None:
        # Where it cannot be kept, the next process builds it again.
        with contextlib.suppress(OSError):
            _keep(content, cache, key)
    return _open(content, cache)


def read_sources() -> str:
    """All that is compiled."""
    folder = resources.files(__package__).joinpath("..")
    return "\n".join(folder.joinpath(name).read_text("utf-8") for name in SOURCES)


def _own_cache() -> Path | None:
    """The cache folder, made if need be; None if there is none that is the user's alone."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder if _is_private(os.lstat(folder), stat.S_ISDIR) else None
    except OSError:
        return None


def _is_private(found: os.stat_result, kind: Callable[[int], bool]) -> bool:
    """Whether it is of a kind, is the user's, and nobody else may write it."""
    return kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _intact(path: Path) -> bytes | None:
    """The content of a library, if it is the user's and what its name says; else None."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not _is_private(os.fstat(descriptor), stat.S_ISREG):
                return None
            content = file.read(_LARGEST)
    except OSError:
        return None
    return content if _name_of(path.name.partition("-")[0], content) == path.name else None


def _name_of(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _keep(content: bytes, cache: Path, key: str) -> None:
    """Puts a library into the cache, in the place of damaged ones for the same use."""
    for path in cache.glob(f"{key}-*.so"):
        if _intact(path) is None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    write_atomically(cache / _name_of(key, content), content, mode=0o700)


def _open(content: bytes, cache: Path | None) -> ctypes.CDLL:
    """Loads a library from a file that nobody else can change or cut short.

    A file that is cut while it is mapped ends the process.

    Raises:
        OSError: If it cannot be loaded, or lacks the kernel.
    """
    for place in _places(cache):
        try:
            with tempfile.TemporaryDirectory(dir=place) as work:
                path = Path(work) / "forward.so"
                path.write_bytes(content)
                # A loaded library needs its name no more.
                loaded = ctypes.CDLL(str(path))
            break
        except OSError as error:
            # No room there, or nothing there may be executed.
            reason = error
    else:
        raise reason
    for name in _OFFERED:
        if not hasattr(loaded, name):
            raise OSError(f"the library has no {name}")
    return loaded


def _places(cache: Path | None) -> list[Path | None]:
    """Where a folder for a while may be made; None: where the system has such folders."""
    return [None] if cache is None else [None, cache]


def _built(compiler: list[str], source: str, cache: Path | None) -> bytes:
    """Compiles; returns the library's content."""
    for place in _places(cache):
        try:
            with tempfile.TemporaryDirectory(dir=place) as work:
                return _compile(compiler, source, Path(work)).read_bytes()
        except OSError as error:
            reason = error
    raise reason


def _compile(compiler: list[str], source: str, folder: Path) -> Path:
    """Compiles into a folder that nobody else uses; returns the library's path.

    Raises:
        ValueError: If the compiler refuses.
    """
    (folder / "forward.cpp").write_text(source, "utf-8")
    out, complaint = folder / "forward.so", ""
    for flags in MACHINE_FLAGS:
        done = _run_compiler(
            [*compiler, *FLAGS, *flags, str(folder / "forward.cpp"), "-o", str(out)]
        )
        if done.status == 0:
            return out
        complaint = complaint or done.output.strip()[-500:] or f"exit status {done.status}"
    raise ValueError(complaint)


class _Done(NamedTuple):
    """What a command has left: its exit status and the end of all that it printed."""

    status: int
    output: str


def _run_compiler(command: list[str]) -> _Done:
    """Runs a command of the compiler, which may hang, never end to print, or print anything.

    Raises:
        OSError: If it cannot be started.
        subprocess.TimeoutExpired: If it takes too long; it and what it has started are ended.
    """
    deadline, printed = time.monotonic() + _SECONDS, b""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        with selectors.DefaultSelector() as waiting, process.stdout as pipe:  # type: ignore[union-attr]
            waiting.register(pipe, selectors.EVENT_READ)
            while True:
                ended = process.poll() is not None
                if not waiting.select(0 if ended else _PAUSE):
                    # What it has started may go on, and hold the pipe.
                    if ended:
                        break
                elif chunk := os.read(pipe.fileno(), 1 << 16):
                    printed = (printed + chunk)[-_SHOWN:]
                else:
                    break
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(shlex.join(command[:1]), _SECONDS)
        status = process.wait(max(deadline - time.monotonic(), _PAUSE))
    finally:
        if process.poll() is None:
            # A compiler is several processes.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _Done(status, printed.decode("utf-8", "replace"))


def _machine() -> str:
    """What the compiler's choice of instructions depends on: a home may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return f"{platform.platform()} {platform.node()}"
    names = ("flags", "Features", "model name", "CPU part", "isa")
    return "\n".join(sorted({x for x in lines if x.partition(":")[0].strip() in names}))


# Logits of dense attention from which on `auto` takes the kernel. Below, the first call would wait
# for a compiler to save a few milliseconds.
AUTO_LOGITS = 9_000_000


def cpp_attention(args: Arguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_attention` defines them."""
    out, lse = _attend(*flatten(args))
    return out, lse


def cpp_unsupported_reason(args: Arguments) -> str | None:
    """Why the compiled kernel cannot run this, or None if it can; builds it if need be."""
    if args.query.device.type != "cpu":
        return f"it runs on the CPU, not on {args.query.device.type}"
    if args.query.dtype != torch.float32:
        return f"it computes float32, not {args.query.dtype}"
    # What is traced cannot start a compiler; the operator does when it runs.
    return None if torch.compiler.is_compiling() else build_failure()


def auto_unsupported_reason(args: Arguments) -> str | None:
    """Why ``auto`` leaves a call to others that the kernel may be able to run, or None."""
    if torch.compiler.is_compiling():
        return "a traced program may run where there is no compiler"
    (b, n, h, _), m = args.query.shape, args.key.shape[1]
    if b * n * h * m < AUTO_LOGITS:
        return f"a compiled kernel pays from {AUTO_LOGITS:,} dense logits on"
    return cpp_unsupported_reason(args)


@torch.library.custom_op(f"{NAMESPACE}::cpp_forward", mutates_args=())
def forward_op(
    query: Tensor, key: Tensor, value: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor,
    block_bias: Tensor | None, mass_probe: Tensor | None, key_lengths: Tensor | None,
    query_offset: Tensor | None, document_ids: Tensor | None, block_q: int, block_k: int,
    causal: bool, offset: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse; ``mass_probe`` matters to the gradient alone."""
    out, lse = empty_results(query)
    _run(
        unflatten(
            query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
            document_ids, block_q, block_k, causal, offset, scale,
        ), out, lse,
    )  # fmt: skip
    return out, lse


forward_op.register_fake(empty_results)
_attend = differentiable(forward_op, backward_op, setup_context, backward)

_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64


class _Problem(ctypes.Structure):
    """``Problem`` of ``cpp_forward.cpp``, field by field."""

    _fields_ = (
        *((name, _Pointer) for name in (
            "query", "key", "value", "counts", "indices", "bias", "offsets", "lengths", "starts",
            "ends", "out", "lse",
        )),
        *((name, _Number * 3) for name in ("query_step", "key_step", "value_step", "count_step")),
        *((name, _Number * 4) for name in ("index_step", "bias_step")),
        *((name, _Number) for name in (
            "batch", "queries", "keys", "heads", "kv_heads", "pattern_heads", "head_dim", "width",
            "block_q", "block_k", "causal", "offset", "threads",
        )),
        ("scale", ctypes.c_double),
    )  # fmt: skip


def _run(args: Arguments, out: Tensor, lse: Tensor) -> None:
    """Fills ``out`` and ``lse``."""
    query, key, value = (rows_of(x) for x in (args.query, args.key, args.value))
    pattern, mask, bias = args.pattern, args.mask, args.block_bias
    per_sample = isinstance(mask.query_offset, Tensor)
    starts = ends = None
    if mask.document_ids is not None:
        starts, ends = document_bounds(mask.document_ids)
        # Padding sees nothing.
        ends = torch.where(mask.document_ids >= 0, ends, starts)
    # In the order of the fields; the tuple keeps what is made here alive during the call.
    tensors = (
        query, key, value, pattern.kv_num_blocks, pattern.kv_indices, bias,
        _integers(mask.query_offset), _integers(mask.key_lengths), _integers(starts),
        _integers(ends), out, lse,
    )  # fmt: skip
    (b, n, h, d), (m, g) = query.shape, key.shape[1:3]
    problem = _Problem(
        *(None if x is None else x.data_ptr() for x in tensors),
        query.stride()[:3], key.stride()[:3], value.stride()[:3], pattern.kv_num_blocks.stride(),
        pattern.kv_indices.stride(), (0,) * 4 if bias is None else bias.stride(),
        b, n, m, h, g, pattern.num_heads, d, pattern.kv_indices.shape[3], *pattern.block_size,
        mask.causal, 0 if per_sample else mask.query_offset, torch.get_num_threads(), args.scale,
    )  # fmt: skip
    status = library().block_sparse_forward(ctypes.byref(problem))
    if status == 1:
        raise ValueError(
            "pattern lists a key block that is not there (kv_num_blocks or kv_indices out of "
            "range); BlockPattern.validate() names it."
        )
    if status:
        raise MemoryError("The compiled CPU kernel found no memory for its buffers.")


def _integers(x: int | Tensor | None) -> Tensor | None:
    """Contiguous int64, of tensors alone."""
    return x.long().contiguous() if isinstance(x, Tensor) else None
