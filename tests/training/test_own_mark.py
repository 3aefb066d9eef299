"""A run of this account is told from one that somebody else made."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from dilated_attention_pytorch.training import own_mark
from dilated_attention_pytorch.training.checkpoint import CheckpointError
from dilated_attention_pytorch.training.own_mark import check_named, is_own, make_mark

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
    assert own_mark._key_path() is None
    assert make_mark(SETTINGS) is None


def test_files_are_named_or_the_run_is_ones_own(tmp_path: Path) -> None:
    mark = make_mark(SETTINGS)
    check_named(tmp_path, SETTINGS, mark, ["model", "text"])
    check_named(tmp_path, SETTINGS, None, [])
    with pytest.raises(CheckpointError, match=r"not made by this account.*--model --text"):
        check_named(tmp_path, SETTINGS, None, ["model", "text"])
