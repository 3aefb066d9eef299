"""Two never write into one folder, whatever ends the first."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dilated_attention_pytorch.training.folder_lock import (
    LOCK_NAME,
    FolderInUseError,
    lock_folder,
)


def holder(folder: Path) -> subprocess.Popen[bytes]:
    # The module alone: the package would import torch, which takes seconds.
    import dilated_attention_pytorch.training.folder_lock as module

    script = (
        f"import runpy, sys, time\nfrom pathlib import Path\n"
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
