"""``dilated-attention report`` and ``diagnose`` on a run of ``train``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dilated_attention_pytorch.analysis.diagnosis import CHECKS
from dilated_attention_pytorch.cli.main import main

TEXT = "Each word of this sentence is as good as any other word of it. " * 400


def train(folder: Path, *options: str) -> Path:
    text = folder / "text.txt"
    text.write_text(TEXT)
    out = folder / "run"
    arguments = [
        "train", "--out", str(out), "--text", str(text), "--dim", "16", "--heads", "2",
        "--seq-len", "128", "--batch-size", "2", "--steps", "6", "--block-size", "16",
        "--log-every", "1", "--checkpoint-every", "3", "--validate-every", "3",
        "--validation-sequences", "2", "--threads", "1", *options,
    ]  # fmt: skip
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("train"))


def test_a_report_of_a_run(run: Path, tmp_path: Path) -> None:
    page, text = tmp_path / "new" / "page.html", tmp_path / "other.txt"
    text.write_text("Something <else> entirely. " * 20)
    options = ["--text", str(text), "--out", str(page), "--samples", "2"]
    assert main(["report", str(run), *options]) == 0
    html = page.read_text()
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert len(data["samples"]) == 2
    assert "".join(data["samples"][0]["texts"]).startswith("Something <else> entirely.")
    titles = [chart["title"] for chart in data["charts"]]
    assert len(titles) == 4
    assert [step for step, _ in data["charts"][0]["series"]["loss"]] == [1, 2, 3, 4, 5, 6]
    assert set(data["charts"][3]["series"]) == {"layer 1", "layer 2"}
    assert "stability" in [x["field"] for x in data["statistics"]]
    assert html.count('class="finding ') == len(CHECKS)


def test_a_diagnosis_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["diagnose", str(run), "--json", "--samples", "2"])
    printed = json.loads(capsys.readouterr().out)
    verdicts = {x["check"]: x["verdict"] for x in printed["findings"]}
    assert code == (0 if printed["healthy"] else 1)
    assert printed["healthy"] == ("fail" not in verdicts.values())
    assert verdicts["temperature"] == "pass"
    assert "at step 6" in next(x for x in printed["findings"])["evidence"]
    assert main(["diagnose", str(run), "--samples", "2"]) == code
    assert "Does a gradient reach every selector?" in capsys.readouterr().out


def test_what_cannot_be_examined(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(list(arguments)) in (1, 2)
        return capsys.readouterr().err

    assert "no checkpoint" in refused("report", str(tmp_path))
    assert "no such text" in refused("report", str(run), "--text", str(tmp_path / "none"))
    short = tmp_path / "short"
    short.write_text("short")
    assert "too little text" in refused("report", str(run), "--text", str(short))
    assert "--samples" in refused("report", str(run), "--samples", "0")
    assert "--samples" in refused("diagnose", str(run), "--samples", "1")
    (tmp_path / "file").touch()
    blocked = str(tmp_path / "file" / "page.html")
    assert "cannot write" in refused("report", str(run), "--samples", "1", "--out", blocked)


@pytest.mark.parametrize("attention", ["dense", "local"])
def test_runs_without_a_selector(
    attention: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = dense(tmp_path) if attention == "dense" else train(tmp_path, "--attention", attention)
    page = tmp_path / "page.html"
    code = main(["report", str(out), "--samples", "1", "--out", str(page)])
    assert code == (1 if attention == "dense" else 0)
    assert main(["diagnose", str(out)]) == 1
    assert attention in capsys.readouterr().err


def dense(folder: Path) -> Path:
    text = folder / "text.txt"
    text.write_text(TEXT)
    out = folder / "run"
    arguments = [
        "train", "--out", str(out), "--text", str(text), "--attention", "dense", "--dim", "16",
        "--heads", "2", "--seq-len", "64", "--steps", "1", "--validation-sequences", "1",
    ]  # fmt: skip
    assert main(arguments) == 0
    return out
