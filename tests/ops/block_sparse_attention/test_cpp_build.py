"""Building the CPU kernel: kept, shared between processes, and its absence explained."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import BlockPattern, block_sparse_attention, explain_backend
from dilated_attention_pytorch.ops.block_sparse_attention import cpp

needs_compiler = pytest.mark.skipif(cpp.find_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def forget(monkeypatch, tmp_path):
    """Each test looks for the library anew, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp, "AUTO_LOGITS", 0)
    cpp._load.cache_clear()
    yield
    cpp._load.cache_clear()


def call(backend="auto"):
    q = torch.randn(1, 64, 2, 16, generator=torch.Generator().manual_seed(0))
    dense = torch.ones(4, 4, dtype=torch.bool).tril()
    dense[3, 1] = False
    pattern = BlockPattern.from_dense(dense, q_len=64, kv_len=64, block_size=16)
    out = block_sparse_attention(q, q, q, pattern, causal=True, backend=backend)
    return out, explain_backend(q, q, q, pattern, causal=True)


BUILDERS = """
import os
from dilated_attention_pytorch.ops.block_sparse_attention import cpp

children = []
for _ in range(2):
    child = os.fork()
    if not child:
        failure = cpp.build_failure()
        print(failure or "built", flush=True)
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


def build_elsewhere():
    """Two processes that start to build at once, forked from one that imported what they need."""
    done = subprocess.run([sys.executable, "-c", BUILDERS], timeout=120, capture_output=True)
    assert done.stdout.split() == [b"built"] * 2, done


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
    monkeypatch.setenv(cpp.SWITCH, "0")
    refuse("environment variable DILATED_ATTENTION_CPP is 0")


@needs_compiler
def test_built_once_and_found_again(monkeypatch):
    out, backend = call()
    assert backend.startswith("cpp")
    (library,) = cpp.cache_folder().iterdir()
    built = library.stat().st_mtime_ns
    cpp._load.cache_clear()
    monkeypatch.setattr(cpp, "_compile", lambda *_: pytest.fail("compiled again"))
    assert torch.equal(call()[0], out)
    assert library.stat().st_mtime_ns == built


@needs_compiler
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert call()[1].startswith("cpp")


@needs_compiler
def test_processes_that_build_at_the_same_time_and_a_library_that_is_damaged_then():
    # By other processes: this one would be handed what it has loaded.
    build_elsewhere()
    (library,) = cpp.cache_folder().iterdir()
    assert library.name.endswith(".so")
    library.write_bytes(b"no library")
    assert call("cpp")[1].startswith("cpp")
    assert library.stat().st_size > 1000


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A library that a compiler has made, for stubs that copy it."""
    if cpp.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("built")
    return cpp._compile(cpp.find_compiler(), cpp.read_sources(), folder)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Makes a compiler of a line of shell; ``$out`` is the file to make, ``$1`` what is asked."""

    def make(line):
        path = tmp_path / "stub"
        path.write_text(f'#!/bin/sh\nfor out; do :; done\n[ "$1" = --version ] && exit 0\n{line}\n')
        path.chmod(0o700)
        monkeypatch.setenv("CXX", str(path))
        cpp._load.cache_clear()

    return make


def kept():
    (path,) = cpp.cache_folder().iterdir()
    return path


def used(builds):
    """That the kernel runs, and how often the stub has built it so far."""
    cpp._load.cache_clear()
    assert call("cpp")[1].startswith("cpp")
    return len(builds.read_text().splitlines()) if builds.exists() else 0


HARM = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": lambda path: path.write_bytes(
        path.read_bytes()[:-9] + b"\x01" + path.read_bytes()[-8:]
    ),
    "text": lambda path: path.write_text("no library"),
    "group": lambda path: path.chmod(0o720),
    "world": lambda path: path.chmod(0o702),
    "link": lambda path: (path.rename(path.parent.parent / "x"), path.symlink_to("../x")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_not_as_it_was_made_is_not_loaded(tmp_path, stub, built, harm):
    builds = tmp_path / "builds"
    stub(f"echo >> {builds}; cp {built} $out")
    assert [used(builds), used(builds)] == [1, 1]
    HARM[harm](kept())
    assert used(builds) == 2
    # Where it could be replaced it was, once for all.
    assert used(builds) == (3 if harm == "folder" else 2)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to give away files")
def test_what_somebody_else_owns_is_not_loaded(tmp_path, stub, built):
    builds = tmp_path / "builds"
    stub(f"echo >> {builds}; cp {built} $out")
    assert used(builds) == 1
    os.chown(kept(), 12345, 12345)
    assert [used(builds), used(builds)] == [2, 2]
    os.chown(cpp.cache_folder(), 12345, 12345)
    assert [used(builds), used(builds)] == [3, 4]


def test_a_folder_that_others_may_write_is_not_used(tmp_path, stub, built):
    builds = tmp_path / "builds"
    stub(f"echo >> {builds}; cp {built} $out")
    assert used(builds) == 1
    for mode in (0o777, 0o720, 0o702):
        cpp.cache_folder().chmod(mode)
        before = used(builds)
        assert used(builds) == before + 1
    cpp.cache_folder().chmod(0o755)
    assert used(builds) == before + 1
    # Nor one that a link leads to.
    cpp.cache_folder().rename(tmp_path / "elsewhere")
    cpp.cache_folder().symlink_to(tmp_path / "elsewhere")
    assert used(builds) == before + 2


def test_a_generous_umask_does_not_spoil_the_cache(tmp_path, stub, built):
    builds = tmp_path / "builds"
    stub(f"echo >> {builds}; cp {built} $out")
    before = os.umask(0)
    try:
        assert [used(builds), used(builds)] == [1, 1]
    finally:
        os.umask(before)


def test_no_home_no_account_and_no_absolute_place(tmp_path, stub, built, monkeypatch):
    stub(f"cp {built} $out")
    monkeypatch.chdir(tmp_path)

    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    for place in (None, "", "relative"):
        if place is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", place)
        cpp._load.cache_clear()
        assert cpp.cache_folder() is None
        assert call("cpp")[1].startswith("cpp")
    assert not (tmp_path / "relative").exists()

    def nowhere(*args, **options):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", nowhere)
    cpp._load.cache_clear()
    refuse("No usable temporary directory")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("printf '\\377\\376 caf\\351\\n'; exit 1", "caf"),
        ("printf '\\377\\376 caf\\351\\n'; printf '\\377' > $out", "building it with"),
        ("exit 0", "building it with"),
        ("mkdir $out", "building it with"),
        ("kill -9 $$", "exit status -9"),
        ("cat > /dev/null; exit 1", "exit status 1"),
    ],
)
def test_any_compiler_that_fails_is_explained(stub, line, reason):
    stub(line)
    refuse(reason)


def test_a_library_without_the_kernel(tmp_path, stub):
    compiler = cpp.find_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "empty.cpp").write_text("int nothing;")
    other = str(tmp_path / "other.so")
    subprocess.run(
        [*compiler, "-shared", "-fPIC", str(tmp_path / "empty.cpp"), "-o", other], check=True
    )
    stub(f"cp {other} $out")
    refuse("has no block_sparse_forward")


@pytest.mark.parametrize("line", ["sleep 60", "sleep 60 & sleep 60", "yes"])
def test_a_compiler_that_does_not_end(stub, monkeypatch, line):
    monkeypatch.setattr(cpp, "_SECONDS", 0.4)
    stub(line)
    start = time.monotonic()
    refuse("timed out after")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("words", ['g++ "', "g++ '-O2", "\\"])
def test_a_variable_that_is_no_command(monkeypatch, words):
    monkeypatch.setenv("CXX", words)
    refuse("CXX is no command")
