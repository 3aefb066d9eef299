"""Building the CPU kernel: kept, shared between processes, and its absence explained."""

import shutil
import subprocess
import sys

import pytest
import torch

from dilated_attention_pytorch import BlockPattern, block_sparse_attention, explain_backend
from dilated_attention_pytorch.ops.block_sparse_attention import cpp, cpp_build

needs_compiler = pytest.mark.skipif(
    cpp_build.find_compiler() is None, reason="there is no C++ compiler"
)


@pytest.fixture(autouse=True)
def forget(monkeypatch, tmp_path):
    """Each test looks for the library anew, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp, "AUTO_LOGITS", 0)
    cpp_build._load.cache_clear()
    yield
    cpp_build._load.cache_clear()


def call(backend="auto"):
    q = torch.randn(1, 64, 2, 16, generator=torch.Generator().manual_seed(0))
    dense = torch.ones(4, 4, dtype=torch.bool).tril()
    dense[3, 1] = False
    pattern = BlockPattern.from_dense(dense, q_len=64, kv_len=64, block_size=16)
    out = block_sparse_attention(q, q, q, pattern, causal=True, backend=backend)
    return out, explain_backend(q, q, q, pattern, causal=True)


def build_elsewhere():
    script = (
        "from dilated_attention_pytorch.ops.block_sparse_attention.cpp_build import build_refusal\n"
        "assert build_refusal() is None, build_refusal()"
    )
    return subprocess.Popen([sys.executable, "-c", script])


def refuse(reason):
    """Without the kernel `auto` takes the PyTorch path, and asking for it says why."""
    assert call()[1].startswith("gather")
    with pytest.raises(ValueError, match=reason):
        call("cpp")


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    refuse("there is no C\\+\\+ compiler")


def test_a_compiler_that_is_not_there(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refuse("there is no C\\+\\+ compiler")


@pytest.mark.skipif(shutil.which("false") is None, reason="needs a command that fails")
def test_a_compiler_that_fails(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    refuse("building it with false failed")


def test_switched_off(monkeypatch):
    monkeypatch.setenv(cpp_build.SWITCH, "0")
    refuse("environment variable DILATED_ATTENTION_CPP is 0")


@needs_compiler
def test_built_once_and_found_again(monkeypatch):
    out, backend = call()
    assert backend.startswith("cpp")
    (library,) = cpp_build.cache_folder().iterdir()
    built = library.stat().st_mtime_ns
    cpp_build._load.cache_clear()
    monkeypatch.setattr(cpp_build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert torch.equal(call()[0], out)
    assert library.stat().st_mtime_ns == built


@needs_compiler
def test_a_damaged_library_is_built_anew():
    # By another process: this one would be handed what it has loaded.
    assert build_elsewhere().wait(timeout=120) == 0
    (library,) = cpp_build.cache_folder().iterdir()
    library.write_bytes(b"no library")
    assert call("cpp")[1].startswith("cpp")
    assert library.stat().st_size > 1000


@needs_compiler
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert call()[1].startswith("cpp")


@needs_compiler
def test_processes_that_build_at_the_same_time():
    running = [build_elsewhere() for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    names = [path.name for path in cpp_build.cache_folder().iterdir()]
    assert len(names) == 1
    assert names[0].endswith(".so")
