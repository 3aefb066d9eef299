"""Checkpoints are written whole or not at all, and damage is seen."""

import os

import pytest
import torch

from dilated_attention_pytorch.training.checkpoint import (
    CheckpointError,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from dilated_attention_pytorch.training.metrics import MetricsFile

STATE = {"weights": torch.arange(1000.0), "number": 3, "nested": {"list": [1, None, "x"]}}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    loaded = load_checkpoint(save_checkpoint(tmp_path, 7, STATE))
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert (loaded["step"], loaded["number"], loaded["nested"]) == (7, 3, STATE["nested"])


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 5, 20, 100):
        save_checkpoint(tmp_path, step, STATE)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, s) for s in (20, 100)]
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 100)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, 1, STATE)

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, 2, STATE)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 1)]
    assert load_checkpoint(newest_checkpoint(tmp_path))["number"] == 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "other"])
def test_damage_is_refused_and_the_previous_one_named(tmp_path, damage):
    save_checkpoint(tmp_path, 1, STATE)
    path = save_checkpoint(tmp_path, 2, STATE)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "one bit":
        place = content.index(torch.tensor(777.0).numpy().tobytes())
        content[place] ^= 1
    else:
        content = b"" if damage == "empty" else b"something else entirely"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.*Remove it to go on from step-00000001"):
        load_checkpoint(path)
    path.unlink()
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 1


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "step-00000003.pt"
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(path)
    torch.save({"format": "dilated_attention_pytorch.training", "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        newest_checkpoint(tmp_path / "none")


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-00000003.pt"
    torch.save({"bomb": _Bomb()}, path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_unfinished_files_are_removed_and_never_listed(tmp_path):
    save_checkpoint(tmp_path, 1, STATE)
    (tmp_path / "step-00000002.pt.4711.tmp").write_bytes(b"half")
    assert len(list_checkpoints(tmp_path)) == 1
    folder = tmp_path / ".dilated-attention-0123456789abcdef.tmp"
    folder.mkdir()
    (folder / "half.bin").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.start()
    for step in (0, 10, 20, 30):
        metrics.append({"step": step, "loss": 1 / (step + 1)})
    with open(metrics.path, "a") as file:
        file.write('{"step": 40, "lo')
    assert metrics.rewind(10) == 3
    assert [line["step"] for line in metrics.read()] == [0, 10]
    assert metrics.path.read_text().endswith("\n")
