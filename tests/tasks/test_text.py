"""Real text: the same bytes every time, and nothing held out that is trained on."""

import os
import tracemalloc
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch.tasks import text
from dilated_attention_pytorch.tasks.text import (
    TextError,
    TextWindows,
    load_text,
    read_bytes,
    read_text,
    standard_library_files,
    text_names,
    validation_windows,
)


@pytest.fixture
def folder(tmp_path):
    for number in range(20):
        path = tmp_path / f"part{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"this is file number {number}. ".encode() * (10 + number))
    return tmp_path


def test_the_standard_library_is_read_in_the_same_order_with_files_held_out():
    one, two = load_text(max_bytes=300_000), load_text(max_bytes=300_000)
    assert one.fingerprint() == two.fingerprint()
    assert one.train_files == two.train_files
    assert not set(one.train_files) & set(one.validation_files)
    assert one.validation_files
    assert standard_library_files() == standard_library_files()
    assert not any("test" in path.parts for path in standard_library_files())


def test_held_out_files_do_not_depend_on_the_order_of_paths(folder):
    parts = [folder / f"part{n}" / "" for n in range(3)]
    whole = load_text([folder], validation_share=0.2)
    assert load_text([folder], validation_share=0.2).fingerprint() == whole.fingerprint()
    assert load_text(parts).fingerprint() == load_text(parts[::-1]).fingerprint()
    assert sorted(whole.train_files + whole.validation_files) == sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")
    )


def test_shares_and_limits_are_kept(folder):
    whole = load_text([folder], validation_share=0.3)
    total = len(whole.train) + len(whole.validation)
    assert 0.25 < len(whole.validation) / total < 0.4
    small = load_text([folder], max_bytes=2000)
    # One separator per joint between files.
    files = len(small.train_files) + len(small.validation_files)
    assert len(small.train) + len(small.validation) == 2000 + files - 2


def test_a_file_named_twice_is_not_trained_on_and_held_out(folder):
    file = folder / "part0" / "file0.txt"
    data = load_text([file, file, folder / "part0" / ".." / "part0" / "file0.txt"])
    assert len(data.train_files) == len(data.validation_files) == 1
    content = file.read_bytes()
    assert bytes(data.train.tolist()) + bytes(data.validation.tolist()) == content


def test_any_bytes_are_text(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(bytes(range(256)) * 4)
    assert load_text([path]).train.unique().numel() == 256


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: [folder / "none"], "no such text"),
        (lambda folder: [folder / "empty"], "holds no files"),
        (lambda folder: [folder / "void.txt"], "all files are empty"),
        (lambda folder: [folder / "short.txt"], "too little text"),
    ],
)
def test_text_that_cannot_be_used_is_named_with_the_remedy(tmp_path, make, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "void.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"short")
    with pytest.raises(TextError, match=words) as caught:
        load_text(make(tmp_path), seq_len=64)
    assert str(tmp_path) in str(caught.value)


def test_every_byte_is_read_once_per_epoch_and_a_position_is_enough_to_go_on():
    data = (torch.arange(1000) % 251).to(torch.uint8)
    windows = TextWindows(data, 30, seed=1)
    epoch = windows.next_batch(windows.per_epoch)
    assert epoch[:, :-1].flatten().unique().numel() == 251
    starts = {tuple(row.tolist()) for row in epoch}
    assert len(starts) == windows.per_epoch
    following = windows.next_batch(3)
    again = TextWindows(data, 30, seed=1)
    again.position = windows.per_epoch
    assert torch.equal(again.next_batch(3), following)
    assert not torch.equal(TextWindows(data, 30, seed=2).next_batch(32), epoch[:32])


def test_validation_windows_do_not_overlap():
    data = torch.arange(250).to(torch.uint8)
    rows = validation_windows(data, 10, 7)
    assert rows.shape == (7, 11)
    assert rows[:, :-1].flatten().unique().numel() == 70
    assert len(validation_windows(data, 10, 10_000)) == 24


def test_read_text_joins_files_and_replaces_bad_bytes(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"second \xff")
    (tmp_path / "a.txt").write_text("first")
    assert "".join(read_text(tmp_path)) == "first\n\nsecond \ufffd"
    assert "".join(read_text(tmp_path / "a.txt")) == "first"
    with pytest.raises(TextError, match="no such text"):
        list(read_text(tmp_path / "missing.txt"))


def test_where_reading_cuts_makes_no_difference(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "part0" / "file0.txt"
    path.write_bytes("Grüße, 世界 🌍\n".encode() * 5 + b"\xf0\x9f")
    whole = load_text([folder]), "".join(read_text(folder)), read_bytes(path, 1)
    assert "世界 🌍\n\ufffd\n\n" in whole[1]
    monkeypatch.setattr(text, "_CHUNK", 3)
    assert load_text([folder]).fingerprint() == whole[0].fingerprint()
    assert "".join(read_text(folder)) == whole[1]
    assert torch.equal(read_bytes(path, 1), whole[2])


def test_both_parts_are_the_files_in_order_of_their_hash(folder: Path) -> None:
    data = load_text([folder], max_bytes=4000)
    names = data.validation_files + data.train_files
    contents = [(folder / name).read_bytes() for name in names]
    # The last one is cut by the limit.
    cut = len(b"".join(contents)) - 4000
    assert 0 <= cut < len(contents[-1])
    joined = b"\x00".join(contents)
    found = b"\x00".join(bytes(x.tolist()) for x in (data.validation, data.train))
    assert found == joined[: len(joined) - cut]


def test_a_text_is_in_memory_once(tmp_path: Path) -> None:
    size, path = 8_000_000, tmp_path / "large.txt"
    path.write_bytes(b"sixteen letters\n" * (size // 16))
    for read in (lambda: load_text([path]), lambda: read_bytes(path, 1)):
        tracemalloc.start()
        data = read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del data
        # A growing buffer reserves an eighth more; besides, there is the part being read.
        assert size < peak < 1.5 * size


def test_names_that_are_the_same_in_two_folders_do_not_depend_on_the_order(folder: Path) -> None:
    for part in ("part0", "part1", "part2"):
        (folder / part / "same.txt").write_text(f"from {part}. " * 20)
    parts = [folder / f"part{n}" for n in range(3)]
    first, second = (load_text(order, validation_share=0.3) for order in (parts, parts[::-1]))
    assert first.fingerprint() == second.fingerprint()
    assert (first.train_files + first.validation_files).count("same.txt") == 3


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_that_are_not_utf_8(folder: Path) -> None:
    odd = os.fsencode(folder) + b"/part0/\xff\xfe.txt"
    try:
        Path(os.fsdecode(odd)).write_text("an odd name " * 9)
    except OSError:
        pytest.skip("the file system refuses such names")
    data = load_text([folder])
    assert len(data.train_files) + len(data.validation_files) == 21


def test_every_text_has_a_name_of_its_own() -> None:
    assert list(text_names(["prose/test.txt", "code/train.py"])) == ["test", "train"]
    given = ["prose/test.txt", "code/test.txt", "other/a.txt", "a.md"]
    assert text_names(given) == {path: Path(path) for path in given}
    # Also where a name with its ending is another one without.
    given = ["b.txt.gz", "b.txt", "a/b.md"]
    assert list(text_names(given)) == given
    assert list(text_names(["a.txt", Path("a.txt")])) == ["a"]
