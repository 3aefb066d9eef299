"""The command line, run for real on small text."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dilated_attention_pytorch.cli.main import main

OPTIONS = ["--dim", "32", "--heads", "2", "--layers", "1", "--seq-len", "64", "--batch-size", "2",
           "--block-size", "16", "--threads", "1", "--validation-sequences", "2",
           "--checkpoint-every", "5", "--log-every", "5"]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    return str(path)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, text, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["train", "--text", text, "--steps", "60", *OPTIONS]
    assert main([*command, "--out", str(whole), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["validation_loss"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dilated_attention_pytorch.cli.main", *command, "--out", str(cut)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(cut.glob("checkpoints/step-000000[1-5]*.pt")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["train", "--resume", "--out", str(cut), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["validation_loss"] == expected

    def losses(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [(json.loads(x)["step"], json.loads(x).get("loss")) for x in lines]

    assert losses(cut) == losses(whole)


def test_errors_name_the_remedy(tmp_path, text, capsys):
    assert main(["train", "--text", str(tmp_path / "none"), "--out", str(tmp_path / "a")]) == 1
    assert "no such text" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path / "b")]) == 1
    assert "no checkpoint" in capsys.readouterr().err
    assert main(["train", "--base-sparsity", "2", "--out", str(tmp_path / "c")]) == 2
    assert "base_sparsity" in capsys.readouterr().err
    command = ["train", "--text", text, "--steps", "5", *OPTIONS, "--out", str(tmp_path / "d")]
    assert main(command) == 0
    for path in (tmp_path / "d" / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:500])
    assert main(["train", "--resume", "--out", str(tmp_path / "d")]) == 1
    assert "damaged" in capsys.readouterr().err
