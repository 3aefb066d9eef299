"""The report of the pretrained experiment: what it keeps, replaces and pairs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    pytest.importorskip("matplotlib", reason="plots need the extra [viz]")
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = importlib.import_module("pretrained_report")
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "runs").mkdir()
    return module


def row(method: str, ratio: float, block_size: int = 64, **more: Any) -> dict[str, Any]:
    return {
        "text": "prose", "length": 8192, "block_size": block_size, "method": method,
        "sparsity": 0.9, "measured_sparsity": 0.9, "ratio": ratio, **more,
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))


def test_the_gap_is_told_for_both_oracles_and_rivals_with_our_shares_do_not_count(
    report: ModuleType,
) -> None:
    rows = [
        row("adapter", 1.05), row("oracle:threshold", 1.06), row("oracle:allotted", 1.04),
        row("antidiagonal:threshold", 1.10), row("antidiagonal:allotted", 1.07),
    ]  # fmt: skip
    (bar,) = report.bars(rows)
    assert bar["best_rival"] == "antidiagonal:threshold"
    assert bar["adapter_closed"] == pytest.approx(0.05 / 0.04)
    assert bar["adapter_closed_allotted"] == pytest.approx(0.05 / 0.06)


def test_cells_are_counted_in_which_the_selectors_lead(report: ModuleType) -> None:
    rows = [
        row("adapter", 1.05), row("adapter:fixed", 1.2), row("antidiagonal", 1.10),
        row("adapter", 1.15, 32), row("adapter:fixed", 1.08, 32), row("antidiagonal", 1.10, 32),
        row("adapter", 1.3, 16), row("adapter:threshold", 1.2, 16), row("mean_pool", 1.10, 16),
        row("adapter:fixed", 1.0, 8), row("mean_pool", 1.10, 8),
    ]  # fmt: skip
    found = report.ahead(report.bars(rows))
    assert found == {"cells": 3, "adapter": 1, "with_best_budget": 2}


def test_what_the_noise_of_the_costs_makes_of_shares_is_what_was_committed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = importlib.import_module("cost_noise")
    committed = json.loads((module.FOLDER / "cost_noise.json").read_text())
    for found, row in zip(
        module.compared(*map(module.measured, module.COMMITS)), committed["rows"], strict=True
    ):
        assert (found["sparsity"], found["rule"]) == (row["sparsity"], row["rule"])
        assert found["price_by_the_other"] == pytest.approx(row["price_by_the_other"])
        assert found["difference"] == pytest.approx(row["difference"])


def test_new_rows_replace_those_of_the_same_cell_alone(report: ModuleType) -> None:
    write(report.RUNS / "evaluate-32.jsonl", [row("antidiagonal", 1.3, 32, commit="a")])
    write(report.RUNS / "evaluate-64.jsonl", [row("antidiagonal", 1.2), row("oracle", 1.1)])
    write(report.RUNS / "evaluate-64-other.jsonl", [row("adapter", 9.0)])
    report.report()
    (report.RUNS / "evaluate-32.jsonl").unlink()
    write(
        report.RUNS / "evaluate-64.jsonl",
        [
            row("oracle", 1.0, commit="b"),
            row("adapter:fixed", 1.05),
            row("oracle:floor0.2", 1.1),
            row("adapter:floor0.2", 1.15),
        ],
    )
    report.report()
    found = json.loads((report.RESULTS / "results.json").read_text())
    kept = [(x["block_size"], x["method"], x["ratio"], x.get("commit")) for x in found["rows"]]
    assert kept == [
        (32, "antidiagonal", 1.3, "a"), (64, "antidiagonal", 1.2, None), (64, "oracle", 1.0, "b"),
        (64, "adapter:fixed", 1.05, None), (64, "oracle:floor0.2", 1.1, None),
        (64, "adapter:floor0.2", 1.15, None),
    ]  # fmt: skip
    (bar,) = found["bars"]
    assert bar["adapter:fixed_closed"] == pytest.approx(0.75)
    assert bar["adapter:floor0.2_closed"] == pytest.approx(0.5)
    assert (report.RESULTS / "perplexity.png").stat().st_size > 1000


def test_an_adapter_without_metrics_is_copied_without_the_machines_paths(
    report: ModuleType,
) -> None:
    folder = report.RUNS / "distill-64" / "adapter"
    folder.mkdir(parents=True)
    about = {"version": 2, "base": {"name": "/somewhere/.cache/smollm2"}}
    (folder / "adapter.json").write_text(json.dumps(about))
    report.report()
    copied = json.loads((report.RESULTS / "adapter" / "adapter.json").read_text())
    assert copied == {"version": 2, "base": {"name": ".cache/smollm2"}}


def test_tuned_models_are_compared_with_dense_tuned_on_the_same_tokens(report: ModuleType) -> None:
    def run(name: str, attention: str, perplexity: float, **changes: Any) -> dict[str, Any]:
        settings = {
            "train": "all", "seq_len": 8192, "batch_size": 1, "base_learning_rate": 3e-5,
            "seed": 0, "steps": 300, "attention": attention, "base_sparsity": 0.9,
        }  # fmt: skip
        stopped = changes.pop("stopped_at_step", None)
        about: dict[str, Any] = {
            "job": {"run": settings | changes, "model": "/somewhere/.cache/smollm2"}
        }
        if stopped is not None:
            about["stopped_at_step"] = stopped
        (report.RUNS / name).mkdir()
        (report.RUNS / name / "done.json").write_text(json.dumps(about))
        return {"run": name, "text": "prose", "length": 8192, "perplexity": perplexity,
                "measured_sparsity": 0.9}  # fmt: skip

    rows = [
        run("tune-all-dense", "dense", 10.0),
        run("tune-all-dense-long", "dense", 8.0, steps=900),
        run("tune-all-0.9", "sparse", 11.0),
        run("tune-all-0.9-long", "sparse", 8.2, steps=2000, stopped_at_step=900),
        run("tune-all-0.9-fast", "sparse", 9.0, base_learning_rate=1e-4),
    ]
    write(report.RUNS / "evaluate-tuned.jsonl", rows)
    report.report()
    found = json.loads((report.RESULTS / "results.json").read_text())
    assert {x["run"]: round(x["ratio"], 6) for x in found["tuned_ratios"]} == {
        "tune-all-0.9": 1.1, "tune-all-0.9-long": 1.025,
    }  # fmt: skip
    assert found["runs"]["tune-all-dense"]["job"]["model"] == ".cache/smollm2"


def test_what_was_not_measured_is_not_written(report: ModuleType, tmp_path: Path) -> None:
    pretrained = importlib.import_module("pretrained")
    nothing = float("nan")
    pretrained.append(tmp_path / "x.jsonl", {"a": 1, "b": nothing, "dense": {"c": nothing, "d": 2}})
    assert report.read_lines(tmp_path / "x.jsonl") == [{"a": 1, "dense": {"d": 2}}]


def test_cells_without_anything_to_choose_are_left_out(report: ModuleType) -> None:
    # 32 blocks: the first row reads one, the other 31 their own and the first, of 528 tiles.
    assert report.most_sparse(2048, 64, 1, 0) == pytest.approx(1 - 63 / 528)
    write(report.RUNS / "evaluate-64.jsonl", [row("oracle", 2.0, length=2048), row("oracle", 1.1)])
    report.report()
    rows = json.loads((report.RESULTS / "results.json").read_text())["rows"]
    assert [r["length"] for r in rows] == [8192]
    pretrained = importlib.import_module("pretrained")
    options = SimpleNamespace(length=8192, lengths="2048,4096", block_size=64, floor=0.0)
    cells = {(length, sparsity) for _, length, _, sparsity in pretrained.plan(options)}
    assert cells == {
        (4096, 0.9), (4096, 0.8), (4096, 0.7), (4096, 0.5), (2048, 0.8), (2048, 0.7), (2048, 0.5),
    }  # fmt: skip
