"""What the experiments share: cells that are run once, a log, a table, a plot and a finding.

Every experiment is one script that describes its cells and calls :func:`run`:

    python experiments/NAME.py                  # what is not there yet
    python experiments/NAME.py --device cuda --jobs 8
    python experiments/NAME.py --device cuda --jobs 24 --gpus 2 --minutes 10
    python experiments/NAME.py --quick          # seconds; nothing kept

Finished cells are skipped, so an interrupted experiment goes on where it stopped; the first seed of
every cell comes first. ``run_all.py`` runs several experiments at once. Results lie in
``results/NAME/``: ``runs.jsonl``, ``README.md`` (promise, finding, table) and ``plot.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from provenance import where
from workers import Execute, Job, Workers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
Runs = Sequence[Mapping[str, Any]]


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
        finding: Says what the runs of all cells show, and whether the promise holds.
        plot: Draws the runs.
        order: Cells and seeds in the order in which to run them, given the finished runs; None:
            one seed of all cells after another.
        needed: Cells without which nothing can be said; None: all of them.
    """

    name: str
    promise: str
    cells: Sequence[Cell]
    execute: Execute
    columns: Mapping[str, str]
    finding: Callable[[Runs], str]
    plot: Callable[[Runs], Figure]
    order: Callable[[Runs], Sequence[tuple[str, int]]] | None = None
    needed: Sequence[str] | None = None

    def says(self, runs: Runs) -> str:
        """The finding, as far as the runs go."""
        done = {run["cell"] for run in runs}
        missing = [cell.name for cell in self.cells if cell.name not in done]
        if not missing:
            return self.finding(runs)
        words = f"Not finished: no run of {', '.join(missing)} yet."
        if self.needed is None or not done.issuperset(self.needed):
            return words
        return f"{words} So far: {self.finding(runs)}"


def values(runs: Runs, cell: str, key: str) -> list[float]:
    """One number of every seed of a cell, in the order of the seeds."""
    found = [run for run in runs if run["cell"] == cell]
    return [run[key] for run in sorted(found, key=lambda run: run["seed"])]


def average(runs: Runs, cell: str, key: str) -> float:
    """The mean over the seeds; NaN without runs."""
    found = values(runs, cell, key)
    return mean(found) if found else float("nan")


def spread(runs: Runs, cells: Sequence[str], key: str) -> float:
    """The largest standard deviation over the seeds of these cells; 0 without two seeds."""
    found = [values(runs, cell, key) for cell in cells]
    return max((stdev(x) for x in found if len(x) > 1), default=0.0)


def verdict(holds: bool) -> str:
    """The beginning of a finding."""
    return "The promise holds here: " if holds else "The promise does not hold here: "


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


def write_results(experiment: Experiment, runs: Runs, folder: Path) -> None:
    """Writes page and plot."""
    order = [cell.name for cell in experiment.cells]
    runs = sorted((r for r in runs if r["cell"] in order), key=lambda r: order.index(r["cell"]))
    cells: dict[str, Runs] = defaultdict(list)
    for run in runs:
        cells[run["cell"]] = [*cells[run["cell"]], run]
    lines = [f"# {experiment.name}", "", f"**Promise.** {experiment.promise}", ""]
    lines += [f"**Finding.** {experiment.says(runs)}", ""]
    lines += ["| setting | " + " | ".join(experiment.columns.values()) + " |"]
    lines += ["|---|" + "---|" * len(experiment.columns)]
    for name in cells:
        row = [" ".join(_number(x) for x in values(runs, name, key)) for key in experiment.columns]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "One number per seed.", "", *where(runs)]
    (folder / "README.md").write_text("\n".join(lines))
    experiment.plot(runs).savefig(folder / "plot.png", dpi=110)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


class Queue:
    """Which run of some experiments comes next, and where results go.

    Args:
        experiments: What to run, by name their results' folders.
        folders: Of the results, by name.
        only: Cells; None: all.
        seeds: None: those of each cell.
    """

    def __init__(
        self,
        experiments: Sequence[Experiment],
        folders: Mapping[str, Path],
        only: Sequence[str] | None,
        seeds: Sequence[int] | None,
    ) -> None:
        self.experiments, self.folders, self.only, self.seeds = experiments, folders, only, seeds
        self.runs = {e.name: load_runs(folders[e.name]) for e in experiments}
        self._begun = {
            (name, run["cell"], run["seed"]) for name, runs in self.runs.items() for run in runs
        }

    def waiting(self) -> list[tuple[Experiment, Cell, int]]:
        """All runs that have not begun, the first seeds of all experiments first."""
        found = [
            (experiment, cell, seed)
            for experiment in self.experiments
            for cell, seed in self._pairs(experiment)
            if (self.only is None or cell.name in self.only)
            and (experiment.name, cell.name, seed) not in self._begun
        ]
        if len(self.experiments) > 1:
            found.sort(key=lambda item: item[2])
        return found

    def _pairs(self, experiment: Experiment) -> list[tuple[Cell, int]]:
        if experiment.order is not None and self.seeds is None:
            cells = {cell.name: cell for cell in experiment.cells}
            return [
                (cells[name], seed) for name, seed in experiment.order(self.runs[experiment.name])
            ]
        pairs = [(cell, seed) for cell in experiment.cells for seed in self.seeds or cell.seeds]
        return sorted(pairs, key=lambda pair: pair[1])

    def next(self) -> Job | None:
        """The next run, which then counts as begun; None: all have."""
        waiting = self.waiting()
        if not waiting:
            return None
        experiment, cell, seed = waiting[0]
        self._begun.add((experiment.name, cell.name, seed))
        return Job(experiment.name, cell.name, seed, cell.settings, experiment.execute)

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Keeps a result."""
        self.runs[job.experiment].append(result)
        with (self.folders[job.experiment] / "runs.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


def conduct(
    experiments: Sequence[Experiment],
    workers: Workers,
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    quick: bool = False,
) -> int:
    """Runs what is not there yet and writes the pages.

    Returns:
        0, or 1 if a run failed.
    """
    start, finished, failed = time.monotonic(), 0, 0
    folders = {experiment.name: RESULTS / experiment.name for experiment in experiments}
    if quick:
        seeds = [0]
        folders = {name: Path(tempfile.mkdtemp(prefix=f"{name}-")) for name in folders}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    queue = Queue(experiments, folders, only, seeds)
    columns = {experiment.name: experiment.columns for experiment in experiments}
    total = len(queue.waiting())
    for number, (job, result) in enumerate(workers.results(queue.next, quick), start=1):
        words = f"[{number}/{total}] {time.monotonic() - start:.0f} s  {job.experiment}: {job.cell}"
        words += f" seed={job.seed}"
        if isinstance(result, Exception):
            failed += 1
            print(words, f"FAILED: {result!r}", flush=True)
            continue
        finished += 1
        queue.add(job, result)
        print(words, {key: result[key] for key in columns[job.experiment]}, flush=True)
    for experiment in experiments:
        if queue.runs[experiment.name]:
            write_results(experiment, queue.runs[experiment.name], folders[experiment.name])
            print(f"wrote {folders[experiment.name]}/README.md and plot.png")
    if finished < total:
        print(f"{total - finished} runs are missing; call again to go on")
    return 1 if failed else 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every script."""
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of each cell")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that they take in turn")
    parser.add_argument("--minutes", type=float, help="end then; what still runs is lost")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, nothing kept")


def workers_of(parsed: argparse.Namespace) -> Workers:
    """What the options say."""
    return Workers(parsed.device, parsed.jobs, parsed.gpus, parsed.minutes)


def option_parser(experiment: Experiment, description: str | None) -> argparse.ArgumentParser:
    """The options of an experiment."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[cell.name for cell in experiment.cells])
    add_options(parser)
    return parser


def run(experiment: Experiment, description: str | None = None) -> int:
    """The command line of an experiment."""
    parsed = option_parser(experiment, description).parse_args()
    return conduct(
        [experiment], workers_of(parsed), only=parsed.only, seeds=parsed.seeds, quick=parsed.quick
    )
