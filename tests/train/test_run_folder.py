"""A run's folder has one writer at a time, belongs to an account, and holds fitting metrics."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dilated_attention_pytorch.train.checkpoint import CheckpointError
from dilated_attention_pytorch.train.run_folder import (
    LOCK_NAME,
    FolderInUseError,
    MetricsFile,
    _key_path,
    check_named,
    is_own,
    lock_folder,
    make_mark,
    parse_line,
)


def holder(folder: Path) -> subprocess.Popen[bytes]:
    # The module alone: what it imports of the package would load torch, which takes seconds.
    import dilated_attention_pytorch.train.run_folder as module

    script = (
        "import runpy, sys, time\nfrom pathlib import Path\nfrom unittest.mock import MagicMock\n"
        "for name in ('', '.files', '.train', '.train.checkpoint'):\n"
        "    sys.modules['dilated_attention_pytorch' + name] = MagicMock()\n"
        f"lock = runpy.run_path({module.__file__!r})['lock_folder']\n"
        "with lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = holder(folder)
        try:
            message = r"runs/new.*choose another --out"
            with pytest.raises(FolderInUseError, match=message), lock_folder(folder):
                pass
            # By another name of the same folder, too.
            (tmp_path / "link").symlink_to(folder)
            with pytest.raises(FolderInUseError), lock_folder(tmp_path / "link"):
                pass
            with lock_folder(tmp_path / "other") as held:
                assert held
        finally:
            process.send_signal(number)
            process.communicate()
            (tmp_path / "link").unlink()
        with lock_folder(folder) as held:
            assert held


def test_one_of_many_threads_holds_it_at_a_time(tmp_path: Path) -> None:
    inside, most, refused, held = 0, 0, 0, 0
    guard, barrier = threading.Lock(), threading.Barrier(8)

    def work() -> None:
        nonlocal inside, most, refused, held
        barrier.wait()
        for _ in range(60):
            try:
                with lock_folder(tmp_path):
                    with guard:
                        inside += 1
                        most, held = max(most, inside), held + 1
                    with guard:
                        inside -= 1
            except FolderInUseError:
                with guard:
                    refused += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert held + refused == 480
    assert os.listdir(tmp_path) == []


def test_nothing_stays_of_who_was_refused_or_failed(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "a" / "b") as held:
        assert held
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError), lock_folder(tmp_path / "a" / "b"):
        raise KeyError
    assert os.listdir(tmp_path) == []
    with lock_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").write_text("")
    assert os.listdir(tmp_path / "a" / "b") == ["result"]
    with lock_folder(tmp_path / "none", create=False) as held:
        assert not held
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_there_already_is_not_followed_or_trusted(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOCK_NAME).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"), lock_folder(folder):
        pass
    assert not victim.exists()
    (folder / LOCK_NAME).unlink()
    (folder / LOCK_NAME).mkdir()
    with pytest.raises(OSError, match="cannot lock the folder"), lock_folder(folder):
        pass
    (folder / LOCK_NAME).rmdir()
    # What one that was killed has left keeps nobody out.
    (folder / LOCK_NAME).write_text("4711")
    with lock_folder(folder) as held:
        assert held


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path) as held:
        assert held is False


def test_a_child_does_not_inherit_it(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with lock_folder(tmp_path) as held:
            assert held
    finally:
        child.communicate(b"\n")


SETTINGS = {"text": {"paths": ["a.txt", "caf\udce9"]}, "run": {"rate": 0.1, "layers": None}}

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def key_file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "dilated_attention_pytorch" / "key"


def test_the_mark_fits_the_settings_alone(tmp_path: Path) -> None:
    mark = make_mark(SETTINGS)
    assert mark == make_mark(SETTINGS)
    assert is_own(tmp_path, SETTINGS, mark)
    other = {**SETTINGS, "text": {"paths": ["/etc/passwd"]}}
    assert not is_own(tmp_path, other, mark)
    for wrong in (None, "", "0" * 64, 5, b"x", [mark], "\ud800"):
        assert not is_own(tmp_path, SETTINGS, wrong)
    endless: list[object] = []
    endless.append(endless)
    for odd in ({1: 2, "a": 3}, {"a": object()}, {"a": endless}):
        assert not is_own(tmp_path, odd, mark)


def test_another_account_makes_other_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = make_mark(SETTINGS)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert not is_own(tmp_path, SETTINGS, mark)
    # Looking makes no key.
    assert not (tmp_path / "other").exists()
    assert make_mark(SETTINGS) != mark
    assert not is_own(tmp_path, SETTINGS, mark)


@posix
def test_the_key_is_the_accounts_alone(tmp_path: Path) -> None:
    mark = make_mark(SETTINGS)
    path = key_file(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["key"]
    path.chmod(0o644)
    assert not is_own(tmp_path, SETTINGS, mark)
    path.chmod(0o600)
    assert is_own(tmp_path, SETTINGS, mark)
    # A folder that everybody may write into is nobody's own.
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    assert not is_own(folder, SETTINGS, mark)
    folder.chmod(0o775)
    assert is_own(folder, SETTINGS, mark)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        assert not is_own(folder, SETTINGS, mark)
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")
    assert make_mark(SETTINGS) is None


def test_two_that_make_the_key_at_once_have_the_same(tmp_path: Path) -> None:
    marks, barrier = [], threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        marks.append(make_mark(SETTINGS))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(marks)) == 1
    assert marks[0] is not None


def test_where_no_key_can_be_kept_nothing_is_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert make_mark(SETTINGS) is None
    assert not is_own(tmp_path, SETTINGS, None)
    monkeypatch.setenv("XDG_STATE_HOME", "relative")

    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert _key_path() is None
    assert make_mark(SETTINGS) is None


def test_files_are_named_or_the_run_is_ones_own(tmp_path: Path) -> None:
    mark = make_mark(SETTINGS)
    check_named(tmp_path, SETTINGS, mark, ["model", "text"])
    check_named(tmp_path, SETTINGS, None, [])
    with pytest.raises(CheckpointError, match=r"not made by this account.*--model --text"):
        check_named(tmp_path, SETTINGS, None, ["model", "text"])


GOOD = {"step": 10, "loss": 2.5, "sparsity": None, "layer_sparsity": [0.5, 0.25]}
ODD = [
    b"", b"\n", b"\x00" * 40, b"\xff\xfe", b'{"step": 3, "lo', b"[1, 2]", b"3", b"null", b'"x"',
    b'{"loss": 1}', b'{"step": "3"}', b'{"step": 3.5}', b'{"step": true}', b'{"step": -1}',
    b'{"step": NaN}', b'{"step": 1e400}', b'{"step": ' + b"9" * 5000 + b"}", b'{"step": null}',
    b'{"step": 99999999999999999999}', b'{"step": [3]}', b'{"step": 3, "loss": NaN}',
    b'{"step": 3, "loss": Infinity}', b'{"step": 3, "loss": "low"}', b'{"step": 3, "loss": [1]}',
    b'{"step": 3, "loss": {"a": 1}}', b'{"step": 3, "loss": true}', b'{"step": 3, "x": 1e999}',
    b'{"step": 3, "layer_sparsity": 0.5}', b'{"step": 3, "layer_sparsity": ["a"]}',
    b'{"step": 3, "layer_sparsity": [NaN]}', b'{"step": 3} {"step": 4}', b"[" * 100_000,
    b'{"step": 3, "caf\xe9": 1}', b'{"step": 3, "loss": ' + b"8" * 400 + b"}",
    b"x" * 3_000_000,
]  # fmt: skip


@pytest.mark.parametrize("line", ODD, ids=lambda line: repr(line[:30]))
def test_an_odd_line_is_left_out_and_told(tmp_path: Path, line: bytes) -> None:
    assert parse_line(line) is None
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.start()
    metrics.append(GOOD)
    with open(metrics.path, "ab") as file:
        file.write(line + b"\n")
    metrics.append({"step": 20, "loss": 1})
    assert metrics.read() == [GOOD, {"step": 20, "loss": 1}]
    assert metrics.note is not None
    assert "line" in metrics.note
    assert str(metrics.path) in metrics.note
    # A run that goes on drops it.
    assert metrics.rewind(20) >= 1
    assert metrics.read() == [GOOD, {"step": 20, "loss": 1}]
    assert metrics.note is None


def test_a_line_behind_one_that_was_cut_is_whole(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.start()
    metrics.append(GOOD)
    with open(metrics.path, "ab") as file:
        file.write(b'{"step": 15, "lo')
    metrics.append({"step": 20, "loss": 1})
    assert [line["step"] for line in metrics.read()] == [10, 20]
    assert metrics.note == f"line 2 of {metrics.path} cannot be read and is left out."


def test_no_file_and_other_line_ends(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.read() == []
    metrics.path.write_bytes(b'\xef\xbb\xbf{"step": 1}\r\n{"step": 2}\r\n')
    assert [line["step"] for line in metrics.read()] == [2]
    assert metrics.note is not None
    with pytest.raises(ValueError, match="JSON"):
        metrics.append({"step": 3, "loss": float("nan")})
    assert [line["step"] for line in metrics.read()] == [2]
