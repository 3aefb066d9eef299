"""Files are read within bounds, and written whole or not at all, alone and together."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import BlockPattern
from dilated_attention_pytorch.files import (
    UNFINISHED,
    parse_tensors,
    read_file,
    replace_files,
    replaced_folder,
    tensor_bytes,
    write_atomically,
)

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


def test_an_ordinary_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_file(path, limit=5) == b"12345"
    with pytest.raises(ValueError, match="at most 4 bytes"):
        read_file(path, limit=4)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_file(tmp_path / "b", limit=4)
    with pytest.raises(ValueError, match="must be an ordinary file"):
        read_file(tmp_path, limit=4)
    with pytest.raises(ValueError, match="zero byte"):
        read_file("a\0b", limit=4)
    with pytest.raises(ValueError, match="cannot read"):
        read_file(path / "below", limit=4)
    with pytest.raises(ValueError, match="cannot read"):
        read_file(tmp_path / ("x" * 5000), limit=4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    caught: list[Exception] = []

    def read() -> None:
        try:
            read_file(tmp_path / "pipe", limit=4)
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert "must be an ordinary file" in str(caught[0])


@pytest.mark.parametrize("failing", range(1, 10))
def test_files_are_replaced_together(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call of the system fails; links and files of all kinds come back."""
    (tmp_path / "a").write_bytes(b"old a")
    (tmp_path / "target").write_bytes(b"elsewhere")
    (tmp_path / "b").symlink_to("target")
    calls = [0]

    def counted(call: object) -> object:
        def run(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == failing:
                raise OSError(28, "No space left on device")
            return call(*args, **kwargs)  # type: ignore[operator]

        return run

    new = {tmp_path / name: name.encode() for name in ("a", "b", "c")}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "replace", counted(os.replace))
        with pytest.raises(OSError, match="No space"):
            replace_files(new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "target"]
    assert (tmp_path / "a").read_bytes() == b"old a"
    assert (tmp_path / "b").is_symlink()
    replace_files(new)
    assert {path: path.read_bytes() for path in new} == new
    assert not (tmp_path / "b").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"elsewhere"


def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "folder"

    def fill(name: str, error: Exception | None = None) -> None:
        with replaced_folder(folder) as new:
            (new / name).write_text(name)
            if error is not None:
                raise error

    with pytest.raises(RuntimeError, match="first"):
        fill("a", RuntimeError("first"))
    assert not folder.exists()
    fill("a")
    with pytest.raises(RuntimeError, match="second"):
        fill("b", RuntimeError("second"))
    assert [path.name for path in folder.iterdir()] == ["a"]
    # A machine that stopped between the two renames.
    os.rename(folder, folder.with_name(".folder.before"))
    with pytest.raises(RuntimeError, match="third"):
        fill("b", RuntimeError("third"))
    assert [path.name for path in folder.iterdir()] == ["a"]
    replace = os.replace
    with monkeypatch.context() as patch:

        def fail(source: Path, target: Path) -> None:
            if str(source).endswith(".new"):
                raise OSError(5, "input/output error")
            replace(source, target)

        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="input/output"):
            fill("b")
    assert [path.name for path in folder.iterdir()] == ["a"]
    fill("b")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


@pytest.fixture
def safetensors() -> Any:
    return pytest.importorskip("safetensors.torch")


def test_tensors_come_back_with_their_digest(safetensors: Any) -> None:
    own = torch.arange(6.0).view(2, 3)
    # The same memory twice, a part of it, nothing, half precision.
    tensors = {"a": own, "b": own, "c": own[:, 1], "d": own[:0], "e": own.bfloat16()}
    content = tensor_bytes(tensors, {"format": "x"})
    found, metadata = parse_tensors(content, "x", required=True)
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert metadata["format"] == "x"
    # The same content is the same bytes, whatever order it comes in.
    named = {"format": "x", "b": "1", "a": "2"}
    turned = tensor_bytes(dict(reversed(tensors.items())), dict(reversed(named.items())))
    assert all(tensor_bytes(tensors, named) == turned for _ in range(8))
    # Any reader of the format takes it.
    assert torch.equal(safetensors.load(content)["c"], own[:, 1])
    # The digest is of what is in it: another order of the header is the same.
    plain = safetensors.save({"a": own})
    parse_tensors(plain, "x")
    with pytest.raises(ValueError, match="no digest"):
        parse_tensors(plain, "x", required=True)


@pytest.mark.usefixtures("safetensors")
@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "as many bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "leaves gaps"),
        (b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}', "a dtype of"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "at most 8 sizes"),
        (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "at most 8 sizes"),
        (
            b'{"a": {"dtype": "F32", "shape": [0, 9000000000000], "data_offsets": [0, 0]}}',
            "at most 8 sizes",
        ),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "two offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "data_offsets"),
        (b"{}", "describes 0 bytes"),
        (b'{"__metadata__": {"a": 1}}', "must be strings"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_headers_that_lie_are_refused(header: bytes, words: str) -> None:
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises(ValueError, match=words) as caught:
        parse_tensors(content, "the file x")
    assert "the file x" in str(caught.value)
    for length in (2**63, len(content), 2**24):
        with pytest.raises(ValueError, match="header would have"):
            parse_tensors(length.to_bytes(8, "little") + header, "x")


@pytest.mark.usefixtures("safetensors")
def test_a_pattern_may_hold_one_tensor_twice(tmp_path: Path) -> None:
    dense = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    made = BlockPattern.from_dense(dense, q_len=48, kv_len=48, block_size=16)
    pattern = BlockPattern(
        made.kv_num_blocks, made.kv_indices, 48, 48, (16, 16), made.kv_num_blocks
    )
    pattern.save(tmp_path / "a")
    found = BlockPattern.load(tmp_path / "a")
    assert torch.equal(found.kv_num_allowed, made.kv_num_blocks)
    assert torch.equal(found.to_dense(), dense)


@pytest.mark.usefixtures("safetensors")
@pytest.mark.parametrize(
    ("about", "words"),
    [
        ('{"q_len": 32, "kv_len": 32, "block_size": [16, 16], "x": 1}', "nothing else"),
        ('{"q_len": true, "kv_len": 32, "block_size": [16, 16]}', "whole numbers"),
        ('{"q_len": "32", "kv_len": 32, "block_size": [16, 16]}', "whole numbers"),
        ('{"q_len": 32.0, "kv_len": 32, "block_size": [16, 16]}', "whole numbers"),
        ('{"q_len": -32, "kv_len": 32, "block_size": [16, 16]}', "whole numbers"),
        ('{"q_len": 32, "kv_len": 32, "block_size": [16, 0]}', "whole numbers"),
        ('{"q_len": 32, "kv_len": 32, "block_size": [16]}', "two block sizes"),
        ('{"q_len": 32, "kv_len": 999999999999, "block_size": [16, 1]}', "16,777,216 blocks"),
    ],
)
def test_patterns_say_sizes_that_patterns_have(about: str, words: str, tmp_path: Path) -> None:
    tensors = {
        "kv_num_blocks": torch.ones(1, 1, 2, dtype=torch.int32),
        "kv_indices": torch.zeros(1, 1, 2, 1, dtype=torch.int32),
    }
    kind = {"format": "dilated_attention_pytorch.block_pattern", "version": "2"}
    (tmp_path / "a").write_bytes(tensor_bytes(tensors, {**kind, "about": about}))
    with pytest.raises(ValueError, match=words) as caught:
        BlockPattern.load(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.usefixtures("safetensors")
def test_a_failing_disk_leaves_the_old_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    BlockPattern.dense(64, 64).save(path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space"):
                BlockPattern.dense(128, 128).save(path)
        assert path.read_bytes() == before
        assert [own.name for own in tmp_path.iterdir()] == ["a"]
