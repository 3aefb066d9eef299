"""``report`` and ``diagnose`` on adapters of pretrained models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from browser import Browser
from tiny_models import byte_pair_tokenizer, save_tiny, tiny_model

pytest.importorskip("rich", reason="needs the extra [cli]")
pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.analysis.diagnosis import CHECKS
from dilated_attention_pytorch.cli.main import main
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import save_adapter
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig

SHORT = ["--seq-len", "128", "--block-size", "16", "--base-sparsity", "0.5"]
DISTILL = [*SHORT, "--windows", "4"]
WORDS = "Über „Käse“ ⇒ 日本語 & <b>: line {} of {}, as every line here. 👩‍👧\n"


def write_text(folder: Path) -> Path:
    for name in ("a", "b"):
        lines = "".join(WORDS.format(n, name) for n in range(60))
        (folder / f"{name}.txt").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer whose tokens hold several characters, and parts of them."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_model("llama", vocab_size=320).save_pretrained(folder)
    byte_pair_tokenizer(WORDS, 320).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def distilled(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "run"
    arguments = ["distill", "--model", str(model), "--text", str(texts), "--out", str(out)]
    assert main([*arguments, *DISTILL]) == 0
    return out


def report(page: Path, *arguments: object) -> dict[str, Any]:
    assert main(["report", *map(str, arguments), "--out", str(page), "--samples", "2"]) == 0
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_a_report_of_an_adapter_shows_its_text(
    distilled: Path, texts: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    data = report(page, distilled / "adapter", "--text", texts / "a.txt")
    shown = ["".join(sample["texts"]) for sample in data["samples"]]
    text = (texts / "a.txt").read_text(encoding="utf-8")
    assert text.startswith(shown[0])
    # A window may begin inside a character.
    assert shown[1].lstrip("\ufffd") in text
    assert [len(sample["texts"]) for sample in data["samples"]] == [8, 8]
    assert data["layers"] == ["layers.0", "layers.1"]
    html = page.read_text(encoding="utf-8")
    assert "What the heads of tiny-llama read" in html
    assert html.count('class="finding ') == len(CHECKS)
    assert "do not anneal" in html
    assert {"kept_mass", "best_mass", "sparsity"} <= {x["field"] for x in data["statistics"]}


def test_the_curve_is_the_models_loss_by_window(distilled: Path, tmp_path: Path) -> None:
    data = report(tmp_path / "page.html", distilled)
    lines = [json.loads(x) for x in (distilled / "metrics.jsonl").read_text().splitlines()]
    charts = {chart["title"]: chart["series"] for chart in data["charts"]}
    assert charts == {
        "Loss on windows of the text, nats per token": {
            "loss": [[line["step"], line["loss"]] for line in lines[1:]]
        }
    }


def test_the_page_of_an_adapter_in_a_browser(distilled: Path, texts: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    report(page, distilled / "adapter", "--text", texts / "a.txt")
    with Browser() as browser:
        browser.open(page)
        browser.wait_for("document.getElementById('reads').textContent !== ''")
        assert browser.errors == []
        assert browser.requests == [page.resolve().as_uri()]
        assert browser.evaluate("document.getElementById('head').options.length") == 4
        browser.evaluate("show({ sample: 0, layer: 1, head: 3, row: 5 })")
        reads = "document.getElementById('reads').textContent.startsWith('Query block 5 reads')"
        browser.wait_for(reads)
        words = browser.evaluate("document.getElementById('text').textContent")
        assert words.startswith("Über „Käse“ ⇒ 日本語 & <b>: line 0 of a, as every line here. 👩‍👧")
        assert browser.evaluate("document.querySelectorAll('.finding').length") == len(CHECKS)
        assert browser.evaluate("document.querySelectorAll('#charts figure').length") == 1


def test_a_diagnosis_of_an_adapter(distilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["diagnose", str(distilled), "--json", "--samples", "2"])
    printed = json.loads(capsys.readouterr().out)
    found = {x["check"]: x for x in printed["findings"]}
    assert code == (0 if printed["healthy"] else 1)
    assert found["temperature"]["verdict"] == "skip"
    assert "do not anneal" in found["temperature"]["evidence"]
    assert found["gradient"]["verdict"] == "pass"
    assert found["finite"]["verdict"] == "pass"
    assert "layers.1: " in found["kept mass"]["evidence"]


@pytest.mark.parametrize("train", ["lora", "all"])
def test_what_was_tuned_with_the_adapter_is_its_base(
    train: str, distilled: Path, model: Path, texts: Path, tmp_path: Path
) -> None:
    if train == "lora":
        pytest.importorskip("peft", reason="needs peft")
    out = tmp_path / "tune"
    arguments = [
        "tune", "--model", str(model), "--text", str(texts), "--adapter",
        str(distilled / "adapter"), "--out", str(out), "--train", train, "--steps", "2",
        "--base-learning-rate", "0.1", *SHORT,
    ]  # fmt: skip
    assert main(arguments) == 0
    page = tmp_path / "page.html"
    report(page, out)
    about = page.read_text(encoding="utf-8")
    assert str(out / ("lora" if train == "lora" else "model")) in about


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(x) for x in arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert "error:" in error
    assert "Traceback" not in error
    return " ".join(error.split())


def test_what_is_no_adapter_or_has_no_base(
    distilled: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refused(capsys, "report", tmp_path)
    assert "neither a run" in found
    assert "no adapter.json" in found
    text = ["--text", texts / "a.txt"]
    adapter = tmp_path / "alone"
    shutil.copytree(distilled / "adapter", adapter)
    about = json.loads((adapter / "adapter.json").read_text())
    about["base"]["name"] = "somebody/a-model"
    (adapter / "adapter.json").write_text(json.dumps(about))
    found = refused(capsys, "report", adapter, *text)
    assert "'somebody/a-model', which is no folder here" in found
    assert "--model" in found
    # Its weights are no weights: sizes are compared before they are looked at.
    (save_tiny(tmp_path / "larger", hidden_size=64) / "model.safetensors").write_bytes(b"none")
    about["base"]["name"] = str(tmp_path / "larger")
    (adapter / "adapter.json").write_text(json.dumps(about))
    found = refused(capsys, "report", adapter, *text)
    assert "where another model is now: hidden_size is" in found
    assert "--model" in found
    other = save_tiny(tmp_path / "other")
    found = refused(capsys, "diagnose", adapter, *text, "--model", other)
    assert "another base model" in found
    (other / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(capsys, "report", adapter, *text, "--model", other)
    missing = ["--model", tmp_path / "missing"]
    assert "no such folder" in refused(capsys, "report", adapter, *text, *missing)
    (adapter / "selectors.safetensors").write_bytes(b"damaged")
    assert "damaged" in refused(capsys, "report", adapter, *text)


def test_what_is_too_short_or_not_given(
    distilled: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "alone"
    shutil.copytree(distilled / "adapter", adapter)
    assert "--text FILE" in refused(capsys, "diagnose", adapter)
    short = tmp_path / "short.txt"
    short.write_text("less than a block")
    found = refused(capsys, "report", adapter, "--text", short)
    assert "too little text" in found
    assert "two blocks" in found
    assert "no such text" in refused(capsys, "report", adapter, "--text", tmp_path / "none")
    found = refused(capsys, "report", adapter, "--text", short, "--seq-len", "31")
    assert "at least 32, two blocks" in found
    found = refused(capsys, "diagnose", distilled, "--samples", "1")
    assert "--samples must be at least 2" in found
    # A text between two blocks and a window is shown in one shorter window.
    short.write_text("A few words, " * 14)
    data = report(tmp_path / "page.html", adapter, "--text", short)
    assert len(data["samples"]) == 1
    assert 2 <= len(data["samples"][0]["texts"]) <= 8
    longer = report(tmp_path / "page.html", distilled, "--seq-len", "64")
    assert [len(sample["texts"]) for sample in longer["samples"]] == [4, 4]


def test_a_distillation_that_has_not_finished(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(distilled, tmp_path / "run", ignore=shutil.ignore_patterns("adapter"))
    assert "when they finish (--resume)" in refused(capsys, "report", tmp_path / "run")


def test_selectors_that_do_not_learn_or_have_no_thresholds(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    given = ["--text", texts / "a.txt", "--seq-len", "64"]
    free = TrainingFreeConfig(method="mean_pool", block_size=16, base_sparsity=0.5)
    with adapt(base, free) as adapted:
        save_adapter(adapted, tmp_path / "free")
    data = report(tmp_path / "page.html", tmp_path / "free", *given)
    assert data["layers"] == ["layers.0", "layers.1"]
    assert 'class="finding ' not in (tmp_path / "page.html").read_text(encoding="utf-8")
    found = refused(capsys, "diagnose", tmp_path / "free", *given)
    assert "holds training-free selectors; nothing in it learns to choose" in found
    with adapt(base, AdaptiveConfig(block_size=16, budget="threshold")) as adapted:
        save_adapter(adapted, tmp_path / "raw")
    assert "has no thresholds" in refused(capsys, "report", tmp_path / "raw", *given)
