"""``evaluate --suite retrieval``: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_models import save_tiny

pytest.importorskip("rich", reason="needs the extra [cli]")
pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.cli.console import PlainConsole
from dilated_attention_pytorch.cli.evaluate import _print_retrieval
from dilated_attention_pytorch.cli.main import main
from dilated_attention_pytorch.hf import retrieval


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("retrieval")
    (folder / "book.txt").write_text("".join(f"line {n} of a book.\n" for n in range(120)))
    return [
        "evaluate", "--suite", "retrieval", "--model", str(save_tiny(folder / "model")), "--text",
        str(folder / "book.txt"), "--lengths", "320", "--windows", "1", "--calibration-windows",
        "1", "--samples", "2", "--tasks", "noise", "needle",
    ]  # fmt: skip


SPARSE = ["--baselines", "mean_pool", "--sparsities", "0.5", "0.6"]


def test_results_are_printed_and_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    assert main([*command, *SPARSE, *out, "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert not (tmp_path / "perplexity.png").exists()
    assert (result["suite"], result["least_dense"]) == ("retrieval", 0.5)
    assert [(x["task"], x["samples"]) for x in result["dense"]] == [("noise", 2), ("needle", 2)]
    assert [(x["sparsity"], x["task"]) for x in result["rows"]] == [
        (0.5, "noise"), (0.5, "needle"), (0.6, "noise"), (0.6, "needle"),
    ]  # fmt: skip
    # A random model answers nothing, and JSON knows no NaN.
    assert {row["ratio"] for row in result["rows"]} == {None}
    assert [(x["sparsity"], x["ratio"], x["tasks"]) for x in result["means"]] == [
        (0.5, None, 0), (0.6, None, 0),
    ]  # fmt: skip
    assert "book, 320 tokens: dense 0: 0 of 6" in shown.err
    assert main([*command, *SPARSE, "--seed", "1", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["dense"][0]["nll"] != result["dense"][0]["nll"]


def test_dense_attention_alone_can_be_asked(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--baselines", "none"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "book, 320 tokens: dense attention" in words
    assert "noise 0.00 [0.00 0.66]" in words
    assert "sparse /" not in words
    assert "not comparable with published ones" in words


def test_the_page_tells_ratios_failures_and_their_mean(capsys: pytest.CaptureFixture[str]) -> None:
    nan = float("nan")
    shared = {"text": "[red]book", "length": 2048, "samples": 50, "nll_interval": (0.1, 0.3)}
    dense = [
        {**shared, "method": "dense", "sparsity": 0.0, "task": task, "score": score,
         "score_interval": (score - 0.1, score + 0.1), "nll": 0.2}
        for task, score in (("needle", 0.8), ("common", 0.2))
    ]  # fmt: skip
    cell = {"text": "[red]book", "length": 2048, "method": "adapter:saved", "sparsity": 0.9}
    rows = [
        {**x, **cell, "measured_sparsity": 0.875, "score": 0.6, "nll": 0.75, "ratio": ratio}
        for x, ratio in zip(dense, (0.75, nan), strict=True)
    ]
    means = [{**cell, "ratio": 0.75, "tasks": 1}]
    _print_retrieval("retrieval", 0.5, dense, rows, means)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= PlainConsole().width
    words = "\n".join(" ".join(line.split()) for line in lines)
    assert "[red]book, 2,048 tokens: adapter:saved at sparsity 0.9" in words
    assert "needle 0.875 0.80 [0.70 0.90] 0.60 [0.70 0.90] 0.750 0.200 0.750" in words
    assert "common 0.875 0.20 [0.10 0.30] 0.60 [0.10 0.30] fails 0.200 0.750" in words
    assert "Mean of sparse / dense over 1 of 2 tasks: 0.750" in words
    assert "fails: dense attention scores below 0.5; the task is not in the mean." in words
    assert "50 questions a task" in words.replace("\n", " ")
    _print_retrieval("retrieval", 0.5, dense, rows, [{**cell, "ratio": nan, "tasks": 0}])
    assert "No mean of sparse / dense: dense attention fails every task." in capsys.readouterr().out


def test_stopping_leaves_no_results_and_a_free_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    out = ["--out", str(tmp_path)]
    monkeypatch.setattr(retrieval, "answer_nll", stop)
    assert main([*command, *SPARSE, *out]) == 130
    assert not (tmp_path / "results.json").exists()
    monkeypatch.undo()
    assert main([*command, "--baselines", "none", *out]) == 0
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tasks", "hay"], 2, "tasks must be among noise, needle, keys, needles"),
        (["--samples", "0"], 2, "samples must be at least 1, got 0"),
        (["--lengths", "96"], 1, "for the task 'noise' with this tokenizer, got 96; take longer"),
        (["--prefixes", "3"], 2, "--prefixes: no effect with --suite retrieval; leave it out"),
        (["--repeats", "3"], 2, "--repeats: no effect with --suite retrieval"),
        (["--suite", "perplexity"], 2, "--tasks, --samples: no effect with --suite perplexity"),
        (["--lengths", "2000"], 1, "too little text: book"),
    ],
)
def test_errors_name_the_argument(
    command: list[str], options: list[str], code: int, words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([*command, "--baselines", "none", *options]) == code
    error = " ".join(capsys.readouterr().err.split())
    assert "error:" in error
    assert words in error


def test_the_help_lists_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert " ".join(retrieval.TASKS) in words
