"""distill, tune and evaluate as commands: what they write, print and refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny_models import save_tiny, tiny_model

pytest.importorskip("rich", reason="needs the extra [cli]")
pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.cli.main import main

DISTILL = ["--windows", "4", "--seq-len", "128", "--block-size", "16", "--base-sparsity", "0.5",
           "--query-stride", "2"]  # fmt: skip

EVALUATE = ["--lengths", "256", "--sparsities", "0.5", "--baselines", "none", "--windows", "1",
            "--repeats", "0", "--json", "--text"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("a", "b"):
        words = "".join(f"line {n} of {name}, as every line here.\n" for n in range(60))
        (folder / f"{name}.txt").write_text(words)
    return folder


@pytest.fixture(scope="module")
def distilled(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "run"
    arguments = ["distill", "--model", str(model), "--text", str(texts), "--out", str(out)]
    assert main([*arguments, *DISTILL]) == 0
    return out


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_distill_writes_metrics_and_adapter(distilled: Path) -> None:
    rows = lines(distilled)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row.get("loss", 0) > 0 for row in rows] == [False, True, True, True, True]
    # Maps that are not fitted yet are not worth measuring.
    assert ["kept_mass_0.5" in row for row in rows] == [False, False, False, False, True]
    about = json.loads((distilled / "adapter" / "adapter.json").read_text())
    assert about["layers"]["0"]["query_stride"] == 2
    assert about["layers"]["0"]["base_sparsity"] == 0.5


def test_a_killed_fit_goes_on_exactly(
    distilled: Path,
    model: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dilated_attention_pytorch.hf.train_selectors import Fitting

    step = Fitting.step
    arguments = ["distill", "--model", str(model), "--text", str(texts), "--out", str(tmp_path)]

    def fail(self: Fitting) -> dict[str, float]:
        if self.step_count == 3:
            raise MemoryError("killed on purpose")
        return step(self)

    monkeypatch.setattr(Fitting, "step", fail)
    with pytest.raises(MemoryError, match="on purpose"):
        main([*arguments, *DISTILL])
    monkeypatch.undo()
    assert main(["distill", "--out", str(tmp_path), "--resume"]) == 0
    assert "window 4: recall_0.5" in capsys.readouterr().err
    assert without_times(lines(tmp_path)) == without_times(lines(distilled))
    name = "adapter/selectors.safetensors"
    assert (tmp_path / name).read_bytes() == (distilled / name).read_bytes()


def test_evaluate_prints_json_and_writes_a_plot(
    distilled: Path, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate", "--model", str(model), "--adapter", str(distilled / "adapter"), "--text",
        str(texts / "a.txt"), "--lengths", "256", "--sparsities", "0.5", "--baselines",
        "sink_window", "oracle:threshold", "--windows", "1", "--repeats", "0",
        "--out", str(tmp_path), "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in result["rows"]] == [
        "adapter:saved", "adapter", "sink_window", "oracle:threshold",
    ]  # fmt: skip
    saved, calibrated = result["rows"][:2]
    # Of the training text and of this one.
    assert saved["sparsity"] == calibrated["sparsity"] == 0.5
    assert saved["measured_sparsity"] != calibrated["measured_sparsity"]
    assert result["rows"][0]["block_size"] == 16
    assert result["rows"][0]["tokens_per_second"] is None
    assert {"kept_mass", "peak_recall", "ratio"} <= set(result["rows"][0])
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert (tmp_path / "perplexity.png").stat().st_size > 1000
    # The adapter's rows see their whole block; it says so below the table.
    assert [row.get("prefix_positions") for row in result["rows"]] == [32, 32, None, None]
    assert main(arguments[:-1]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "perplexity relative to dense" in words
    measured = f"{saved['kept_mass']:.3f} {saved['peak_recall']:.3f} -"
    assert measured in words
    assert f"{saved['prefix_loss']:.4f} nats from the prefix alone and" in words
    assert f"and {calibrated['teacher_forced_loss']:.4f} in that pass." in words
    # Nothing beside the table.
    assert main([*arguments[:-3], "--prefixes", "0"]) == 0
    assert "prefix alone" not in capsys.readouterr().out


def tune(distilled: Path, model: Path, texts: Path, out: Path, *more: str) -> list[str]:
    return [
        "tune", "--model", str(model), "--text", str(texts), "--adapter",
        str(distilled / "adapter"), "--out", str(out), "--steps", "2", "--seq-len", "128",
        "--base-sparsity", "0.5", "--block-size", "16", "--json", *more,
    ]  # fmt: skip


def test_the_speed_of_an_adapter_is_measured_and_noted_in_it(
    model: Path, texts: Path, distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(distilled / "adapter", folder)
    command = ["evaluate", "--model", str(model), "--text", str(texts), "--suite", "speed"]
    measure = [*command, "--adapter", str(folder), "--repeats", "1"]
    assert main([*measure, "--lengths", "64", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["length"] for row in found["rows"]] == [64, 128]
    about = json.loads((folder / "adapter.json").read_text())
    assert about["dense_below"] == {found["device"]: found["dense_below"]}
    assert (found["device"], found["written"]) == ("cpu", True)
    # Lengths of its own where none are named: up to what the model has positions for.
    assert main(measure) == 0
    shown = capsys.readouterr().out
    assert "On cpu; this is noted in the adapter" in shown
    assert main(command) == 2
    assert "--suite speed needs --adapter" in capsys.readouterr().err
    assert main([*measure, "--sparsities", "0.5"]) == 2
    assert "--sparsities: no effect with --suite speed" in capsys.readouterr().err


def test_tune_starts_from_the_adapter(
    distilled: Path, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune(distilled, model, texts, tmp_path, "--train", "all")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 2
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter.json").is_file()
    # The tuned weights are the adapter's new base, and come with their tokenizer.
    evaluate = [
        "evaluate", "--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter"),
        *EVALUATE, str(texts / "a.txt"),
    ]  # fmt: skip
    assert main(evaluate) == 0
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert main(evaluate) == 1
    assert "no tokenizer" in capsys.readouterr().err


# Python shows it once; the tests otherwise make errors of warnings.
@pytest.mark.filterwarnings("always::dilated_attention_pytorch.hf.AdapterWarning")
def test_low_rank_changes_are_evaluated(
    distilled: Path, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="needs peft")
    assert main(tune(distilled, model, texts, tmp_path, "--base-learning-rate", "0.1")) == 0
    capsys.readouterr()
    evaluate = ["evaluate", "--model", str(model), "--adapter", str(tmp_path / "adapter"),
                *EVALUATE, str(texts / "a.txt")]  # fmt: skip
    found = []
    for lora in ([], ["--lora", str(tmp_path / "lora")]):
        assert main([*evaluate, *lora]) == 0
        shown = capsys.readouterr()
        found.append(json.loads(shown.out)["dense"][0]["perplexity"])
        warned = "dilated-attention evaluate: warning: the adapter was made for a base" in shown.err
        assert warned == (not lora)
    assert abs(found[0] / found[1] - 1) > 0.01
    assert main([*evaluate, "--lora", str(texts)]) == 1
    assert "cannot load low-rank changes" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert "error:" in error
    assert "Traceback" not in error
    return " ".join(error.split())


def test_errors_say_what_to_do(
    distilled: Path, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    text, folder = ["--text", str(texts)], ["--model", str(model)]
    assert "--model is missing" in refused(capsys, ["distill", *text, *out], 2)
    found = refused(capsys, ["distill", *folder, *text, *out, "--seq-len", "32"], 2)
    assert "at least two blocks of 32 tokens" in found
    found = refused(capsys, ["distill", *folder, *text, *out, "--seq-len", "9999"], 1)
    assert "too little text" in found
    short = tmp_path / "short.txt"
    short.write_text("less than a block")
    found = refused(capsys, ["evaluate", *folder, "--text", str(short)], 1)
    assert "too little text: short" in found
    assert "no such text" in refused(capsys, ["distill", *folder, "--text", "nowhere", *out], 1)
    other = save_tiny(tmp_path / "other", num_hidden_layers=3)
    evaluate = ["evaluate", "--text", str(texts / "a.txt"), "--lengths", "256"]
    found = refused(
        capsys,
        [*evaluate, "--model", str(other), "--adapter", str(distilled / "adapter"),
         "--baselines", "none"],
        1,
    )  # fmt: skip
    assert "another base model" in found
    found = refused(capsys, [*evaluate, *folder, "--baselines", "best"], 2)
    assert "method must be one of" in found
    found = refused(capsys, ["distill", "--resume", "--out", str(distilled), "--windows", "9"], 2)
    assert "leave ['windows'] out" in found
    assert "no run of tune" in refused(capsys, ["tune", "--resume", "--out", str(distilled)], 2)
    found = refused(capsys, ["distill", *folder, *text, *out, "--scorer", "mlp"], 2)
    assert "dilated-attention tune trains the others" in found
    found = refused(capsys, ["train", "--resume", "--out", str(distilled)], 1)
    assert "is not a checkpoint of dilated-attention train" in found
    found = refused(capsys, ["distill", *folder, *text, "--out", str(distilled), *DISTILL], 2)
    assert "already holds a run" in found


def test_unsupported_architectures_are_refused_with_the_reason(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    folder = tmp_path / "mamba"
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=256)
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / name)
    arguments = ["distill", "--model", str(folder), "--text", str(texts), "--out", str(tmp_path)]
    found = refused(capsys, [*arguments, *DISTILL], 1)
    assert "'mamba' is not supported: no layer calls attention" in found


def test_help_needs_no_transformers_and_lists_the_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in ("distill", "tune", "evaluate"):
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        assert "--model" in capsys.readouterr().out


def test_defaults_shown_are_those_of_the_dataclasses() -> None:
    from dilated_attention_pytorch.cli.options import DEFAULTS
    from dilated_attention_pytorch.config import DISTILLED, AdaptiveConfig
    from dilated_attention_pytorch.hf.job import PretrainedJob
    from dilated_attention_pytorch.hf.train_selectors import FitRun, TuneRun, distilled_config

    run = FitRun()
    made = (run, TuneRun(), PretrainedJob(run=run, model="", text=()))
    for name, value in vars(DEFAULTS).items():
        own = [x for x in made if name in {field.name for field in dataclasses.fields(x)}]
        assert {getattr(x, name) for x in own} == {value}, name
    assert distilled_config() == AdaptiveConfig(**DISTILLED)
    assert run.config.threshold_floor == distilled_config(budget="threshold").threshold_floor > 0
    # What knows no floor has none, unless it is asked for, which is refused.
    for other in ({"budget": "fixed"}, {"query_scope": "past"}):
        assert distilled_config(**other).threshold_floor == 0
        with pytest.raises(ValueError, match="threshold_floor"):
            distilled_config(**other, threshold_floor=0.5)


def test_a_model_that_is_not_there_is_named_at_once(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--text", str(texts / "a.txt")]
    (tmp_path / "empty").mkdir()
    commands = (
        ["distill", "--out", str(tmp_path / "out"), *text],
        ["tune", "--out", str(tmp_path / "out"), *text],
        ["evaluate", *EVALUATE, str(texts / "a.txt")],
        ["allot", "--adapter", "a", "--out", str(tmp_path / "out"), *text],
    )
    for command in commands:
        for place, why in (("nowhere", "no such folder"), ("empty", "no config.json")):
            words = refused(capsys, [*command, "--model", str(tmp_path / place)], 2)
            assert "--model must be the folder of a pretrained model" in words
            assert why in words


def test_another_models_tokenizer_is_named(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    tiny_model("llama", vocab_size=40).save_pretrained(small)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, small)
    text, options = str(texts / "a.txt"), ["--model", str(small)]
    for command in (
        ["evaluate", *EVALUATE, text, "--baselines", "sink_window"],
        ["distill", "--text", str(texts), "--out", str(tmp_path / "out"), *DISTILL],
    ):
        assert "the tokenizer is another model's" in refused(capsys, [*command, *options], 1)


def test_lengths_that_leave_nothing_to_choose_are_named(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate", "--model", str(model), "--text", str(texts / "a.txt"), "--lengths", "256",
        "--sparsities", "0.5", "0.95", "--baselines", "antidiagonal", "--windows", "1",
        "--block-size", "32", "--repeats", "0",
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr()
    # Eight blocks: 15 of 36 tiles are always read.
    assert "0.95 (0.583)*" in shown.out
    assert "0.5 (0.5" in shown.out
    assert shown.out.count(")*") == 1
    assert "* The blocks that are always read" in shown.out
    # No terminal here: lines instead of a bar.
    assert "a, 256 tokens: antidiagonal 0.5: 0 of 2" in shown.err
    run = ["distill", "--model", str(model), "--text", str(texts), "--out", str(tmp_path), *DISTILL]
    assert main([*run, "--windows", "2"]) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "fitting: 1 of 2: loss" in words
    assert "calibrating: 1 of 2" in words


def test_settings_that_leave_nothing_to_choose_are_refused(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model), "--text", str(texts), "--out", str(tmp_path / "out")]
    for command in ("distill", "tune"):
        given = DISTILL[2:] if command == "tune" else DISTILL
        words = refused(capsys, [command, *options, *given, "--base-sparsity", "0.9"], 2)
        assert "nothing is left to choose at sparsity 0.9: in 128 tokens" in words
        assert not (tmp_path / "out").exists()


def test_names_of_texts_are_no_markup_and_no_formula(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[red]$x^$\x1b[31m\u202e\udce9.txt"
    shutil.copy(texts / "a.txt", tmp_path / name)
    command = [
        "evaluate", "--model", str(model), "--text", str(tmp_path / name), "--lengths", "256",
        "--sparsities", "0.5", "--baselines", "sink_window", "--windows", "1",
        "--repeats", "0", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "[red]$x^$\\x1b[31m\\u202e\\xe9: perplexity relative" in " ".join(shown.out.split())
    assert "[red]$x^$\\x1b[31m\\u202e\\xe9, 256 tokens" in shown.err
    for words in (shown.out, shown.err):
        assert all(c.isprintable() or c == "\n" for c in words)
    assert (tmp_path / "out" / "perplexity.png").stat().st_size > 1000
