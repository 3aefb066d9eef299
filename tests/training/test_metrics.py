"""Metrics: what is cut, damaged or odd is left out with a note, and never reaches a reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from dilated_attention_pytorch.training.metrics import MetricsFile, parse_line

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
