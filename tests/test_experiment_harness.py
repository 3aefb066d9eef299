"""The harness of the experiments: order, failures, time limit, and findings that can say no."""

from __future__ import annotations

import importlib
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # Worker processes look for modules where this one does.
    monkeypatch.syspath_prepend(str(EXPERIMENTS.parent / "benchmarks"))
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("harness")


def load(name: str) -> Any:
    return importlib.import_module(name)


def work(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    if settings.get("fails"):
        raise ValueError("on purpose")
    time.sleep(settings.get("seconds", 0))
    return {"loss": float(seed), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}


def experiment(harness: ModuleType, **cells: Mapping[str, Any]) -> Any:
    return harness.Experiment(
        "x", "A promise.", [harness.Cell(name, cells[name], (0, 1)) for name in cells], work,
        {"loss": "loss"}, lambda runs: "A finding.",
        lambda runs: harness.bars(runs, "loss", "loss"),
    )  # fmt: skip


def test_the_first_seed_of_all_cells_comes_first(harness: ModuleType, tmp_path: Path) -> None:
    both = experiment(harness, a={}, b={})
    queue = harness.Queue([both], {"x": tmp_path}, None, None)
    jobs = iter(queue.next, None)
    assert [(j.cell, j.seed) for j in jobs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_run_is_reported_and_the_others_go_on(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, jobs: int
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    workers = load("workers").Workers(jobs=jobs, gpus=jobs)
    both = experiment(harness, a={"fails": True}, b={"seconds": 0.2})
    assert harness.conduct([both], workers) == 1
    assert "ValueError('on purpose')" in capsys.readouterr().out
    runs = harness.load_runs(tmp_path / "x")
    assert sorted((run["cell"], run["seed"]) for run in runs) == [("b", 0), ("b", 1)]
    assert {run["gpu"] for run in runs} <= ({"5", "7"} if jobs == 2 else {"5,7"})
    assert "Not finished: no run of a yet." in (tmp_path / "x" / "README.md").read_text()


def test_what_runs_when_time_is_over_is_ended_and_lost(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    workers = load("workers").Workers(jobs=1, minutes=0.05)
    begin = time.monotonic()
    assert harness.conduct([experiment(harness, a={"seconds": 600})], workers) == 0
    assert time.monotonic() - begin < 60
    assert harness.load_runs(tmp_path / "x") == []


def runs_of(**cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Two seeds of every cell."""
    about = {"environment": {"device": "a card"}}
    return [
        {"cell": cell, "seed": seed, **about, **numbers}
        for cell, numbers in cells.items()
        for seed in (0, 1)
    ]


def said(name: str, numbers: Mapping[str, dict[str, Any]]) -> bool:
    """Whether a finding says that the promise holds."""
    found = load(name).EXPERIMENT.finding(runs_of(**numbers))
    assert "nan" not in found
    assert ("The promise holds" in found) is not ("does not hold" in found)
    return "The promise holds" in found


def accuracies(names: Any, *numbers: float, **more: Any) -> dict[str, dict[str, Any]]:
    pairs = zip(names, numbers, strict=True)
    return {str(name): {"accuracy": number, **more} for name, number in pairs}


def test_annealing_speed_can_say_no() -> None:
    names = list(load("annealing_speed").SHARES)
    assert said("annealing_speed", accuracies(names, 0.5, 0.9, 1.0, 0.9, 0.6))
    assert not said("annealing_speed", accuracies(names, 1.0, 1.0, 1.0, 1.0, 1.0))
    assert not said("annealing_speed", accuracies(names, 1.0, 0.9, 0.9, 0.9, 0.6))


def test_block_sizes_can_say_no() -> None:
    sizes = load("block_sizes").SIZES
    assert said("block_sizes", accuracies(sizes, 1.0, 1.0, 0.9, 0.6, sparsity=0.75))
    assert not said("block_sizes", accuracies(sizes, 1.0, 0.7, 0.9, 0.6, sparsity=0.75))
    assert not said("block_sizes", accuracies(sizes, 1.0, 1.0, 1.0, 1.0, sparsity=0.75))


def test_varied_and_uniform_can_say_no() -> None:
    module = load("varied_and_uniform")
    names = [f"{kind}, {method}" for kind in module.TARGETS for method in module.METHODS]
    fixed = [0.4] * (len(module.METHODS) - 1)
    best = [1.0, *fixed[1:]]
    assert said("varied_and_uniform", accuracies(names, 1.0, *fixed, 1.0, *best))
    assert not said("varied_and_uniform", accuracies(names, 0.4, *fixed, 1.0, *best))
    assert not said("varied_and_uniform", accuracies(names, 1.0, *fixed, 0.9, *best))


def test_sparsity_by_length_can_say_no() -> None:
    module = load("sparsity_by_length")
    names = [f"{n} tokens, {rule}" for n in module.LENGTHS for rule in module.RULES]
    assert said("sparsity_by_length", accuracies(names, *[1.0] * len(names)))
    assert not said("sparsity_by_length", accuracies(names, *[1.0] * (len(names) - 1), 0.8))
    # The longest is left out where it is not learned, and the one before decides.
    assert said("sparsity_by_length", accuracies(names, *[1.0] * (len(names) - 2), 0.1, 0.0))
    unlearned = accuracies(names, *[1.0] * (len(names) - 3), 0.8, 0.1, 0.1)
    assert not said("sparsity_by_length", unlearned)
    assert not said("sparsity_by_length", accuracies(names, *[0.1] * len(names)))


def test_head_specialisation_can_say_no() -> None:
    targets = load("head_specialisation").TARGETS
    for kinds, holds in (("2 local, 2 periodic", True), ("4 mixed", False)):
        cells = {target: {"kinds": kinds, "similarity": 0.5} for target in targets}
        assert said("head_specialisation", cells) is holds


def test_segments_can_say_no() -> None:
    names = list(load("segments").SEGMENTS)
    assert said("segments", accuracies(names, 0.9, 0.9, 0.9, 0.9, ceiling=0.9))
    assert not said("segments", accuracies(names, 0.9, 0.9, 0.9, 0.7, ceiling=0.9))


def test_regulariser_can_say_no() -> None:
    weights = load("regulariser").WEIGHTS
    for distances, holds in (((0.1, 0.002, 0.01, 0.01), True), ((0.1, 0.1, 0.1, 0.06), False)):
        cells = {
            f"{weight:g}": {"distance": distance, "sparsity": 0.8, "loss": 1.0}
            for weight, distance in zip(weights, distances, strict=True)
        }
        assert said("regulariser", cells) is holds


def test_distilled_patterns_can_say_no() -> None:
    cells = load("distilled_patterns").CELLS
    assert said("distilled_patterns", {c.name: {"before": 1.0, "after": 1.0} for c in cells})
    # Less accuracy, or more nats.
    for place, after in ((0, 0.4), (2, 1.4)):
        numbers = {c.name: {"before": 1.0, "after": 1.0} for c in cells}
        numbers[cells[place].name]["after"] = after
        assert not said("distilled_patterns", numbers)


def test_input_dependent_sparsity_can_say_no() -> None:
    kinds = load("input_dependent_sparsity").KINDS
    for sparsities, holds in (((0.95, 0.95, 0.9, 0.9, 0.85), True), ((0.9,) * 5, False)):
        numbers = {k: {"sparsity": s} for k, s in zip(kinds, sparsities, strict=True)}
        assert said("input_dependent_sparsity", numbers) is holds


def language_model_runs(adaptive: float) -> dict[str, dict[str, Any]]:
    cells = load("language_model").CELLS
    numbers = {cell.name: {"loss": 0.9, "steps_per_second": 20.0} for cell in cells}
    numbers["dense"] |= {"loss": 0.8}
    numbers["strided 0.9"] |= {"loss": 0.85}
    numbers["adaptive defaults"] |= {"loss": adaptive}
    return numbers


@pytest.mark.parametrize(
    ("adaptive", "strided", "holds"),
    [(0.809, 0.85, True), (0.811, 0.85, False), (0.809, 0.809, False)],
)
def test_language_model_can_say_no(adaptive: float, strided: float, holds: bool) -> None:
    numbers = language_model_runs(adaptive)
    numbers["strided 0.9"]["loss"] = strided
    assert said("language_model", numbers) is holds


def test_language_model_says_how_far_it_has_come() -> None:
    module = load("language_model")
    numbers = language_model_runs(0.809)
    for name in list(numbers):
        if name not in (*module.NEEDED, "local 0.9"):
            del numbers[name]
    runs = runs_of(**numbers)
    words = module.EXPERIMENT.says(runs)
    assert words.startswith("Not finished: no run of adaptive 0.9, mean-pooled 0.9, ")
    assert " So far: The promise holds" in words
    assert "strided 0.9, behind adaptive defaults | +0.0410 | more than the spread" in words
    assert " | +0.0410 +0.0410 |" in words
    assert "nan" not in words
    assert "blocks of 64, on" not in words
    without_dense = [run for run in runs if run["cell"] != "dense"]
    assert "So far" not in module.EXPERIMENT.says(without_dense)


def test_every_method_has_every_seed_and_the_first_comes_first() -> None:
    module = load("language_model")
    order = module.order([])
    count = len(module.MAIN)
    assert order[: 3 * count] == [(name, seed) for seed in (0, 1, 2) for name in module.MAIN]
    others = [cell.name for cell in module.CELLS if ", blocks of" in cell.name]
    assert order[3 * count :] == [(name, 0) for name in others]


@pytest.mark.parametrize(("rates", "holds"), [((1.1, 1.5, 2.0, 3.0), True), ((1.1, 0.9), False)])
def test_language_model_speed_can_say_no(rates: tuple[float, ...], holds: bool) -> None:
    module = load("language_model_speed")
    numbers = {}
    for factor, rate in zip(module.FACTORS, rates, strict=False):
        for method in module.METHODS:
            speed = rate if method == "adaptive defaults" else 1.0
            name = module.cell_name(method, factor)
            numbers[name] = {"tokens": 8192 * factor, "steps_per_second": speed * 20.0}
    runs = runs_of(**numbers)
    # A round in which the machine was slow for all changes no ratio.
    for run in runs:
        if run["seed"] == 1:
            run["steps_per_second"] /= 2
    words = module.finding(runs)
    assert words.startswith("The promise holds here") is holds
    row = " | ".join(("adaptive defaults", *(f"{rate:.2f}" for rate in rates)))
    assert f"| {row} |" in words
    assert ("32,768" in words) is holds


def test_what_segments_let_a_model_find() -> None:
    module = load("segments")
    assert module.ceiling({}) == pytest.approx(1.0)
    # Segments of 8 blocks: row i reaches i % 8 of its i earlier blocks, the rest is a guess in 16.
    reachable = sum((i % 8) / i for i in range(1, 32)) / 31
    alone = module.ceiling({"run": module.SEGMENTS["128 tokens"]})
    assert alone == pytest.approx(reachable + (1 - reachable) / 16)


def test_pairs_per_row() -> None:
    pairs_per_row = load("hierarchical").pairs_per_row
    assert pairs_per_row(512, (), 0) == 512
    assert pairs_per_row(512, (16,), 5) == 32 + 6 * 16
    assert pairs_per_row(512, (4, 4), 9) == 32 + 10 * 4 + 10 * 4
    # Keeping everything scores everything, and the super-blocks besides.
    assert pairs_per_row(30, (8,), 99) == 4 + 30


def test_what_a_run_writes_makes_no_other_program_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    provenance = load("provenance")
    monkeypatch.delenv("PROJECT_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == "unknown"
    result, page, code = (tmp_path / x for x in ("benchmarks/results/a", "docs/b", "src/c"))
    for path in (result, page, code):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init"], ["add", "."], [*who, "commit", "-m", "a"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    found = provenance.commit()
    assert len(found) == 12
    result.write_text("2")
    page.write_text("2")
    (tmp_path / "untracked").write_text("2")
    assert provenance.commit() == found
    code.write_text("2")
    assert provenance.commit() == f"{found}-dirty"
