"""Every experiment runs in its quick mode, keeps nothing, and is on the index page."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
NAMES = sorted(
    path.stem for path in EXPERIMENTS.glob("*.py") if "EXPERIMENT = Experiment(" in path.read_text()
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_quick_mode(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
    harness = importlib.import_module("harness")
    before = sorted((EXPERIMENTS / "results").rglob("*"))
    assert harness.run(importlib.import_module(name).EXPERIMENT) == 0
    assert sorted((EXPERIMENTS / "results").rglob("*")) == before
    (folder,) = tmp_path.glob(f"{name}-*")
    page = (folder / "README.md").read_text()
    assert "**Promise.**" in page
    assert "**Finding.**" in page
    assert "nan" not in page
    assert (folder / "plot.png").stat().st_size > 1000


def test_finished_cells_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = importlib.import_module("harness")
    experiment = importlib.import_module("input_dependent_sparsity").EXPERIMENT
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--seeds", "0", "--only", "constant"])
    assert harness.run(experiment) == 0
    (run,) = harness.load_runs(tmp_path / experiment.name)
    recorded = harness.load_runs(EXPERIMENTS / "results" / experiment.name)
    same = next(r for r in recorded if (r["cell"], r["seed"]) == ("constant", 0))
    assert run["sparsity"] == pytest.approx(same["sparsity"], abs=1e-3)
    # What is there already is not run again.
    assert harness.run(experiment) == 0
    assert len(harness.load_runs(tmp_path / experiment.name)) == 1


def test_the_index_page_is_what_the_results_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = importlib.import_module("index")
    assert sorted(index.NAMES) == NAMES
    shown = index.PICTURES
    monkeypatch.setattr(index, "PICTURES", tmp_path)
    page = index.render()
    assert index.PAGE.read_text() == page
    # Each in its own place.
    for name in ("learning_map", "beyond_needles", "train_defaults"):
        assert page.count(index.body(index.RESULTS / name)) == 1
    assert page.count(index.table(index.RESULTS / "needle" / "table.md")) == 1
    index.copy_pictures()
    for picture in tmp_path.iterdir():
        assert picture.read_bytes() == (shown / picture.name).read_bytes(), picture.name


def test_the_command_with_nothing_set_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train_defaults.py", "--quick"])
    before = sorted((EXPERIMENTS / "results").rglob("*"))
    importlib.import_module("train_defaults").main()
    shown = capsys.readouterr().out
    assert "512 dense 0: " in shown
    assert "512 adaptive 0: " in shown
    assert sorted((EXPERIMENTS / "results").rglob("*")) == before


def test_runs_on_a_gpu_have_a_row_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = importlib.import_module("train_defaults")
    runs = module.load(module.RESULTS / "runs.jsonl")
    module.write_page(runs, tmp_path)
    assert (tmp_path / "README.md").read_text() == (module.RESULTS / "README.md").read_text()
    runs = [run for run in runs if run["on"] == "cpu"]
    module.write_page(runs, tmp_path)
    alone = (tmp_path / "README.md").read_text().splitlines()
    module.write_page([*runs, *({**run, "on": "cuda", "loss": 1.0} for run in runs)], tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert set(alone) < set(lines)
    # Of today's defaults and of those before.
    for row in ("16 | 0 | yes | 0.8", "16 | 1 | yes | 0.75"):
        assert sum(line.startswith(f"| 512 on a GPU | {row} |") for line in lines) == 1
    # What ran on a CPU is still to be run on a GPU.
    tried: list[str] = []
    monkeypatch.setattr(module, "train", lambda *given: tried.append(given[4]) or runs[0])
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    for device in ("cpu", "cuda:0"):
        words = ["x", "--out", str(tmp_path), "--seeds", "0", "--device", device]
        monkeypatch.setattr(sys, "argv", words)
        module.main()
    assert tried == ["cuda:0", "cuda:0"]


def test_the_page_of_floors_is_what_its_runs_say(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    module = importlib.import_module("threshold_floors")
    module.write_page(module.load(module.RESULTS), tmp_path)
    assert (tmp_path / "README.md").read_text() == (module.RESULTS / "README.md").read_text()
