"""What the experiments share: cells that are run once, a log, a table, a plot and a finding.

Every experiment is one script that describes its cells and calls :func:`run`:

    python experiments/NAME.py                  # what is not there yet
    python experiments/NAME.py --device cuda --jobs 8
    python experiments/NAME.py --quick          # seconds; nothing kept

Finished cells are skipped, so an interrupted experiment goes on where it stopped. Results lie in
``results/NAME/``: ``runs.jsonl``, ``README.md`` (promise, finding, table) and ``plot.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from provenance import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
Runs = Sequence[Mapping[str, Any]]
Execute = Callable[[Mapping[str, Any], int, bool, str], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One setting, run with several seeds.

    Attributes:
        name: Its key.
        settings: What the experiment's ``execute`` is called with.
        seeds: Of the runs.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Experiment:
    """One promise and what tests it.

    Attributes:
        name: Of the script and its folder.
        promise: One sentence.
        cells: The settings.
        execute: ``(settings, seed, quick, device) -> numbers``, at module level (it runs in other
            processes).
        columns: Numbers to show, by key of the result: their heading.
        finding: Says in one sentence what the runs show.
        plot: Draws the runs.
    """

    name: str
    promise: str
    cells: Sequence[Cell]
    execute: Execute
    columns: Mapping[str, str]
    finding: Callable[[Runs], str]
    plot: Callable[[Runs], Figure]


def values(runs: Runs, cell: str, key: str) -> list[float]:
    """One number of every seed of a cell, in the order of the seeds."""
    found = [run for run in runs if run["cell"] == cell]
    return [run[key] for run in sorted(found, key=lambda run: run["seed"])]


def average(runs: Runs, cell: str, key: str) -> float:
    """The mean over the seeds; NaN without runs."""
    found = values(runs, cell, key)
    return mean(found) if found else float("nan")


def bars(runs: Runs, key: str, label: str) -> Figure:
    """The mean of every cell as a bar, its seeds as dots."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["cell"] for run in runs))
    figure = Figure(figsize=(6.5, 1 + 0.4 * len(names)), layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(reversed(names)):
        found = values(runs, name, key)
        axis.barh(place, mean(found), color="#0072b2", alpha=0.5)
        axis.plot(found, [place] * len(found), "o", color="#0072b2", ms=4)
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)
    return figure


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a folder."""
    path = folder / "runs.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _execute(execute: Execute, cell: Cell, seed: int, quick: bool, device: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    result = execute(cell.settings, seed, quick, device)
    about = {"cell": cell.name, "seed": seed, "settings": dict(cell.settings)}
    return {**about, **result, "environment": environment(device)}


def _results(
    experiment: Experiment, tasks: Sequence[tuple[Cell, int]], quick: bool, device: str, jobs: int
) -> Iterator[dict[str, Any]]:
    """Results as they come; in processes of their own if there are several jobs."""
    if jobs == 1:
        for cell, seed in tasks:
            yield _execute(experiment.execute, cell, seed, quick, device)
        return
    with ProcessPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(_execute, experiment.execute, cell, seed, quick, device)
            for cell, seed in tasks
        ]
        for future in as_completed(futures):
            yield future.result()


def write_results(experiment: Experiment, runs: Runs, folder: Path) -> None:
    """Writes page and plot."""
    order = [cell.name for cell in experiment.cells]
    runs = sorted((r for r in runs if r["cell"] in order), key=lambda r: order.index(r["cell"]))
    cells: dict[str, Runs] = defaultdict(list)
    for run in runs:
        cells[run["cell"]] = [*cells[run["cell"]], run]
    lines = [f"# {experiment.name}", "", f"**Promise.** {experiment.promise}", ""]
    lines += [f"**Finding.** {experiment.finding(runs)}", ""]
    lines += ["| setting | " + " | ".join(experiment.columns.values()) + " |"]
    lines += ["|---|" + "---|" * len(experiment.columns)]
    for name in cells:
        shown = [
            " ".join(_number(x) for x in values(runs, name, key)) for key in experiment.columns
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    places = {
        f"{run['environment']['device']}, torch {run['environment']['torch']}, commit "
        f"{run['environment']['commit']}"
        for run in runs
    }
    lines += ["", "One number per seed. Ran on " + "; ".join(sorted(places)) + ".", ""]
    (folder / "README.md").write_text("\n".join(lines))
    experiment.plot(runs).savefig(folder / "plot.png", dpi=110)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def run(experiment: Experiment, description: str | None = None) -> int:
    """The command line of an experiment."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[cell.name for cell in experiment.cells])
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of each cell")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, nothing kept")
    parsed = parser.parse_args()
    folder, seeds = RESULTS / experiment.name, parsed.seeds
    if parsed.quick:
        folder, seeds = Path(tempfile.mkdtemp(prefix=f"{experiment.name}-")), [0]
    folder.mkdir(parents=True, exist_ok=True)
    done = {(r["cell"], r["seed"]) for r in load_runs(folder)}
    tasks = [
        (cell, seed)
        for cell in experiment.cells
        if parsed.only is None or cell.name in parsed.only
        for seed in seeds or cell.seeds
        if (cell.name, seed) not in done
    ]
    results = _results(experiment, tasks, parsed.quick, parsed.device, parsed.jobs)
    for number, result in enumerate(results, start=1):
        with (folder / "runs.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        shown = {key: result[key] for key in experiment.columns}
        done_now = f"[{number}/{len(tasks)}] {result['cell']} seed={result['seed']}"
        print(done_now, shown, flush=True)
    write_results(experiment, load_runs(folder), folder)
    print(f"wrote {folder}/README.md and plot.png")
    return 0
