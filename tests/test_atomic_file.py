"""Files are replaced whole or not at all, and nothing is followed or left behind."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from dilated_attention_pytorch.atomic_file import UNFINISHED, write_atomically

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def test_the_content_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"old", b"", b"new" * 100_000):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("name", ["open", "fsync", "replace", "fchmod"])
def test_an_error_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    real = os.open

    def full(name: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_EXCL:
            # The file is made, and there is no room in it.
            os.close(real(name, flags, *rest))
            return real("/dev/full", os.O_WRONLY)
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", full)
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interruption_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@posix
def test_flushed_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(*names: Any) -> None:
        done.append("replace")
        replace(*names)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "file", b"new")
    assert done == ["file", "replace", "folder"]


@posix
def test_a_folder_that_cannot_be_flushed_is_no_error_but_a_broken_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    for code, harmless in ((errno.EINVAL, True), (errno.EIO, False)):

        def fail(descriptor: int, code: int = code) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fail)
        if harmless:
            write_atomically(tmp_path / "file", b"new")
        else:
            with pytest.raises(OSError, match="Input/output"):
                write_atomically(tmp_path / "file", b"new")


@posix
def test_the_name_is_new_unforeseeable_and_never_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = os.open

    def noted(name: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT:
            opened.append((Path(name), flags))
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", noted)
    for _ in range(3):
        write_atomically(tmp_path / "file", b"new")
    assert len({name for name, _ in opened}) == 3
    for name, flags in opened:
        assert UNFINISHED.fullmatch(name.name)
        assert str(os.getpid()) not in name.name or len(str(os.getpid())) < 4
        assert flags & os.O_EXCL
        assert flags & os.O_NOFOLLOW
    # Whoever guesses it all the same gets nothing written to where a link leads.
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    (tmp_path / f".dilated-attention-{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"other")
    assert victim.read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == b"new"


@posix
def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("precious")
    for target in (victim, tmp_path / "nothing", link):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        write_atomically(link, b"new")
        assert not link.is_symlink()
        assert link.read_bytes() == b"new"
    assert victim.read_text() == "precious"


@posix
def test_permissions_are_kept_or_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "new", b"")
        write_atomically(tmp_path / "given", b"", mode=0o600)
    finally:
        os.umask(before)
    (tmp_path / "private").write_bytes(b"old")
    (tmp_path / "private").chmod(0o600)
    write_atomically(tmp_path / "private", b"new")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"new": 0o640, "given": 0o600, "private": 0o600}


@posix
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as channel:
        here = os.getcwd()
        os.chdir(tmp_path)
        channel.bind("socket")
        os.chdir(here)
        for name in ("pipe", "socket"):
            with pytest.raises(OSError, match="not a file"):
                write_atomically(tmp_path / name, b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", b"new")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe", "socket"]


@posix
@pytest.mark.parametrize("name", [b"x" * 255, b"caf\xe9", b"[red]\x1b[0m", "über".encode()])
def test_any_name_that_a_file_can_have(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
