"""``dilated-attention train``: interruption, exit codes, and errors that name the remedy."""

import contextlib
import io
import json
import os
import re
import signal
import sys
import time

import pytest
import torch

from dilated_attention_pytorch.cli.main import main
from forked import forking

SMALL = ["--dim", "32", "--heads", "2", "--layers", "1", "--seq-len", "64", "--batch-size", "2",
         "--threads", "1", "--validation-sequences", "2", "--log-every", "5"]  # fmt: skip
BLOCK = ["--block-size", "16"]
OPTIONS = ["--dim", "32", "--heads", "2", "--layers", "1", "--seq-len", "64", "--batch-size", "2",
           "--block-size", "16", "--threads", "1", "--validation-sequences", "2",
           "--checkpoint-every", "5", "--log-every", "5"]  # fmt: skip


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write_text(folder):
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    return str(path)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def run_command(arguments, folder):
    """What a process of its own does: the command, its output in files."""
    os.environ["COLUMNS"] = "80"
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main(arguments))


def start_command(arguments, folder):
    process = forking().Process(target=run_command, args=(arguments, folder))
    process.start()
    return process


STOPPED = ["--steps", "80", *SMALL, *BLOCK, "--checkpoint-every", "70"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What is printed of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    command = ["train", "--text", write_text(folder), *STOPPED, "--out", str(folder / "run")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*command, "--json"]) == 0
    return json.loads(printed.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(
    tmp_path, text, capsys, number, code, uninterrupted
):
    cut = tmp_path / "cut"
    process = start_command(["train", "--text", text, *STOPPED, "--out", str(cut)], tmp_path)
    metrics, deadline = cut / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(90)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == code, errors
    assert f"train --out {cut} --resume" in errors
    # What was measured before the stop says when.
    shown = (tmp_path / "output").read_text()
    assert re.search(r"held-out loss .*\(step 0\)", shown), shown
    lines = [json.loads(line) for line in metrics.read_bytes().splitlines()]
    logged = [line["step"] for line in lines if "loss" in line][-1]
    stopped = int(re.search(r"steps +│ (\d+) of 80", shown).group(1))
    when = rf" \(step {logged}\)" if logged < stopped else ""
    assert re.search(rf"training loss +│ [\d.]+ nats per byte{when} ", shown), shown
    assert main(["train", "--resume", "--out", str(cut), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    for name in ("validation_loss", "training_loss", "validation_sparsity", "steps"):
        assert summary[name] == uninterrupted[name]
    # A run that is done says so again.
    assert main(["train", "--resume", "--out", str(cut), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["validation_loss"] == uninterrupted["validation_loss"]


@pytest.mark.parametrize("attention", ["dense", "local", "strided"])
def test_every_kind_trains_and_the_table_says_where_things_are(tmp_path, text, capsys, attention):
    out = tmp_path / "run"
    options = [] if attention == "dense" else [*BLOCK, "--base-sparsity", "0.4"]
    command = ["train", "--text", text, "--attention", attention, "--steps", "2", *SMALL, *options]
    assert main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert "bits per byte" in shown
    assert "metrics.jsonl" in shown
    assert ("sparsity, asked for │ 0.4" in shown) == (attention != "dense")
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    if attention == "dense":
        assert last["validation_sparsity"] is None
    else:
        assert last["validation_sparsity"] == pytest.approx(0.4)


def test_every_option_reaches_the_run(tmp_path, text):
    out = tmp_path / "run"
    command = ["train", "--text", text, "--steps", "1", *SMALL, *BLOCK, "--out", str(out)]
    options = {
        "lr": 0.001, "weight-decay": 0.1, "seed": 5, "max-bytes": 9000, "validation-share": 0.2,
        "base-sparsity": 0.3, "num-local-blocks": 1, "num-sink-blocks": 1, "query-scope": "block",
        "estimator": "gumbel", "selector-weight": 0.2, "scorer": "mlp", "scorer-dim": 6,
        "scorer-layers": 2, "budget": "fixed", "num-explore-blocks": 1, "temperature": 0.9,
        "min-temperature": 0.2, "annealing-share": 0.5, "schedule": "cosine",
        "sparsity-weight": 0.3, "validate-every": 7, "checkpoint-every": 9,
    }  # fmt: skip
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += ["--segment-lengths", "32", "64", "--dilation-rates", "1", "2"]
    command += ["--pooling", "mean", "min", "--no-learnable-temperature", "--share-across-heads"]
    command += ["--hard-sparsity"]
    assert main(command) == 0
    state = torch.load(out / "checkpoints" / "step-00000001.pt", weights_only=True)["loop"]
    run, config = state["run"], state["run"]["config"]
    names = {"lr": "learning_rate", "scorer-dim": "hidden_dim"}
    for name, value in options.items():
        key = names.get(name, name.replace("-", "_"))
        if name == "scorer-layers":
            assert config["num_layers"] == 2
            continue
        assert {**state["text"], **state["intervals"], **config, **run}[key] == value, name
    assert (run["segment_lengths"], run["dilation_rates"]) == ([32, 64], [1, 2])
    assert config["pooling"] == ["mean", "min"]
    assert not config["learnable_temperature"]
    assert config["share_across_heads"]
    assert config["hard_sparsity"]
    resumed = [x for x in command if x != "train"]
    assert main(["train", "--resume", *resumed]) == 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--base-sparsity", "2"], 2, "base_sparsity"),
        (["--seq-len", "0"], 2, "seq_len"),
        (["--dim", "33"], 2, "dim"),
        (["--lr", "-1"], 2, "learning_rate"),
        (["--attention", "local", "--estimator", "mass"], 2, "--estimator: no effect"),
        (["--attention", "dense", "--block-size", "16"], 2, "--block-size: no effect"),
        (["--attention", "local", "--scorer-layers", "2"], 2, "--scorer-layers: no effect"),
        (["--segment-lengths", "64"], 2, "dilation_rates"),
        (["--num-selected-blocks", "2"], 2, "budget"),
        (["--log-every", "0"], 2, "log_every"),
        (["--max-bytes", "0"], 2, "max_bytes"),
        (["--validation-share", "0.9"], 2, "validation_share"),
        (["--device", "cuda:99"], 2, "cuda:99"),
        (["--text", "/no/such/file"], 1, "/no/such/file"),
        (["--seq-len", "100000000"], 1, "too little text"),
        (["--resume"], 1, "nothing to resume"),
    ],
)
def test_wrong_usage_is_explained(tmp_path, text, capsys, options, code, words):
    given = [] if "--text" in options or "--resume" in options else ["--text", text]
    assert main(["train", *given, *options, "--out", str(tmp_path / "run")]) == code
    errors = capsys.readouterr().err
    assert words in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "options",
    [["--attention", "none"], ["--estimator", "x"], ["--budget", "threshold"], ["--nonsense"]],
)
def test_the_parser_refuses_with_exit_code_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *options])
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_resume_refuses_other_settings_and_a_second_start(tmp_path, text, capsys):
    out = str(tmp_path / "run")
    command = ["train", "--text", text, "--steps", "2", *SMALL, *BLOCK, "--out", out]
    assert main(command) == 0
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", out, "--steps", "9"]) == 2
    assert "steps is 2 there and 9 here" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", out, "--checkpoint-every", "3"]) == 0


def test_a_wrong_option_shows_the_commands_own_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--wrong"])
    assert ended.value.code == 2
    words = capsys.readouterr().err
    assert "usage: dilated-attention train" in words
    assert "unrecognized arguments: --wrong" in words


def test_killed_and_resumed_equals_uninterrupted(tmp_path, text, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["train", "--text", text, "--steps", "60", *OPTIONS]
    assert main([*command, "--out", str(whole), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["validation_loss"]
    process = start_command([*command, "--out", str(cut)], tmp_path)
    deadline = time.monotonic() + 60
    while not list(cut.glob("checkpoints/step-000000[1-5]*.pt")) and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
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
