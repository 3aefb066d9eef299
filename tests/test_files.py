"""Files are read within bounds, and written together or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import BlockPattern
from dilated_attention_pytorch.file_access import read_file, replace_files, replaced_folder
from dilated_attention_pytorch.strict_json import parse_json, sealed, unsealed

pytest.importorskip("safetensors")

from safetensors.torch import load, save

from dilated_attention_pytorch.tensor_file import parse_tensors, tensor_bytes


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nest at most 32"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nest at most 32"),
        (b'{"a": 1, "a": 1}', "'a' stands twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        (b"NaN", "NaN is no number"),
        (b"[-Infinity]", "Infinity is no number"),
        (b"1e400", "too large"),
        (b"9223372036854775808", "more than 64 bits"),
        (b"-" + b"1" * 100_000, "more than 64 bits"),
        (b'"\\ud83d"', "is no text"),
        (b'{"\\udc00": 1}', "is no text"),
        (b'"\xff"', "no valid JSON"),
        (b"\xef\xbb\xbf1", "BOM"),
        (b"", "no valid JSON"),
        (b"1 2", "no valid JSON"),
    ],
)
def test_json_that_means_two_things_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_json(content, "the file x")
    assert "the file x" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_json_within_bounds_is_read() -> None:
    deepest = b"[" * 32 + b"]" * 32
    value: object = parse_json(deepest, "x")
    for _ in range(31):
        assert isinstance(value, list)
        (value,) = value
    assert parse_json(b'{"a": [9223372036854775807, -0.0, "\\ud83d\\ude00", null]}', "x") == {
        "a": [2**63 - 1, 0.0, "😀", None]
    }
    # Other libraries write what this one does not.
    assert parse_json(b"1000000000000000019884624838656", "x", foreign=True) == int(1e30)
    with pytest.raises(ValueError, match="more than 400 digits"):
        parse_json(b"1" * 401, "x", foreign=True)


def test_a_digest_is_of_the_content_and_not_of_its_looks() -> None:
    value = {"b": [1, 2.5], "a": None}
    whole = sealed(value)
    turned = dict(reversed(whole.items()))
    assert unsealed(turned, "x", required=True) == value
    with pytest.raises(ValueError, match="not as it was written"):
        unsealed({**whole, "b": [1, 2.5000001]}, "x", required=False)
    with pytest.raises(ValueError, match="no digest"):
        unsealed(value, "x", required=True)
    assert unsealed(value, "x", required=False) == value


def test_tensors_come_back_with_their_digest() -> None:
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
    assert torch.equal(load(content)["c"], own[:, 1])
    # The digest is of what is in it: another order of the header is the same.
    plain = save({"a": own})
    parse_tensors(plain, "x")
    with pytest.raises(ValueError, match="no digest"):
        parse_tensors(plain, "x", required=True)


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
