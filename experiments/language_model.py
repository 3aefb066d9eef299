"""Language modelling on real text: dense, adaptive, fixed patterns, mean pooling, FlexAttention.

Byte-level transformers of 25 million parameters on 100 million bytes of Python sources (the
standard library, torch, sympy, networkx), 8,192 bytes of context, the same bytes in the same order
for all methods of a seed. All sparse methods read the same number of blocks in every row, as far as
it sees as many: at 0.9 (0.901 by tiles) 13 of 32 bytes, two of which are its own and the one
before; with blocks of 64 (0.909 by tiles) 6, two of them likewise.

    python experiments/language_model.py --device cuda              # one at a time: it is timed
    python experiments/language_model.py --device cuda --jobs 2 --gpus 2 --minutes 19
    python experiments/language_model.py --device cuda --only dense "adaptive 0.9" --seeds 0
    python experiments/language_model.py --device cuda --graph --compile  # faster, for all alike
    python experiments/language_model.py --device cuda --only "adaptive 0.9" --seeds 1 \
        --config '{"hidden_dim": 64}' --name "hidden 64"    # an attempt, not on the page
    python experiments/language_model.py --quick

One seed of every method comes first, then the other two seeds, and at last one seed of larger
blocks. *Adaptive defaults* is what ``train`` sets at this length, a budget by content.
``language_model_speed.py`` measures speeds alone, at longer contexts too. See
``harness.py`` for the other options.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from dilated_attention_pytorch.tasks.text import validation_windows
from harness import (
    RESULTS,
    Cell,
    Experiment,
    Runs,
    average,
    conduct,
    load_runs,
    option_parser,
    spread,
    values,
    verdict,
    workers_of,
)
from language_model_training import FULL, QUICK, Training, measure
from python_sources import python_sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGE = 64
LARGE_SUFFIX = f", blocks of {LARGE}"
OURS = "adaptive defaults"
FIXED = ("local", "dilated", "strided", "hierarchical", "sink_local", "random")


def execute(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Trains one model and measures it on held-out text."""
    size = (QUICK if quick else FULL).of(settings)
    text = python_sources(size.max_bytes)
    training = Training(settings, size, text.train, seed, device)
    curve: list[list[float]] = []
    every, seconds = max(1, size.steps // 50), []
    start = begin = time.perf_counter()
    for step in range(size.steps):
        loss = training.step()
        if (step + 1) % every == 0:
            # Reading the loss waits for the device, so that the time is that of all steps since.
            curve.append([step + 1, loss.item()])
            now = time.perf_counter()
            seconds.append((now - start) / every)
            start = now
    windows = validation_windows(text.validation, size.seq_len, size.validation)
    return {
        **measure(training.model, windows, device),
        "train_curve": curve,
        "steps_per_second": 1 / median(seconds),
        "seconds": start - begin,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "bytes": size.steps * size.batch_size * size.seq_len,
        "text": {"bytes": len(text.train), "sha256": text.fingerprint(), "source": text.source},
    }


def order(runs: Runs) -> list[tuple[str, int]]:
    """One seed of all methods, then the other seeds of all, then larger blocks."""
    main = [(name, seed) for seed in (0, 1, 2) for name in MAIN]
    return [*main, *((cell.name, 0) for cell in CELLS if cell.name not in MAIN)]


def finding(runs: Runs) -> str:
    """Holds the numbers against the bars."""
    means = _means(runs, MAIN)
    baselines = [name for name in means if not name.startswith("adaptive") and name != "dense"]
    best = min(baselines, key=means.__getitem__)
    noise = spread(runs, [OURS, best], "loss")
    gap, lead = means[OURS] - means["dense"], means[best] - means[OURS]
    seeds = min(len(values(runs, name, "loss")) for name in (OURS, best))
    met = gap <= 0.01, lead > noise and seeds > 1
    words = f"{verdict(all(met))}{sum(met)} of 2 bars are met. {_elsewhere(runs)}".rstrip()
    spreads = f"more than the spread of the two over {seeds} seeds, {noise:.4f}"
    table = [
        "| bar | measured | asked | seed by seed |",
        "|---|---|---|---|",
        f"| {OURS} behind dense, nats per byte | {gap:+.4f} | at most +0.01 | "
        f"{_pairs(runs, 'dense', OURS)} |",
        f"| the best without a learned choice, {best}, behind {OURS} | {lead:+.4f} | "
        f"{spreads if seeds > 1 else 'how far seeds differ is not known'} | "
        f"{_pairs(runs, OURS, best)} |",
    ]
    return words + "\n\n" + "\n".join(table)


def _means(runs: Runs, names: Sequence[str]) -> dict[str, float]:
    """The mean loss of the cells that have run, best first."""
    done = {run["cell"] for run in runs}
    means = {name: average(runs, name, "loss") for name in names if name in done}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def _listed(runs: Runs, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in _means(runs, names).items())


def _pairs(runs: Runs, name: str, other: str) -> str:
    """By how much the second loss exceeds the first, for every seed that both have.

    A seed's weights, text and order of the text are the same for all methods.
    """
    first, second = (
        {run["seed"]: run["loss"] for run in runs if run["cell"] == cell} for cell in (name, other)
    )
    common = sorted(first.keys() & second.keys())
    return " ".join(f"{second[seed] - first[seed]:+.4f}" for seed in common)


def _card(run: Mapping[str, Any]) -> str:
    card: str = run["environment"]["device"]
    return card


def _same_card(runs: Runs) -> Runs:
    """The runs whose speed compares to dense's."""
    cards = {_card(run) for run in runs if run["cell"] == "dense"}
    return [run for run in runs if _card(run) in cards]


def _elsewhere(runs: Runs) -> str:
    """Whether runs had another card than dense, so that speeds do not compare."""
    compared = _same_card(runs)
    if all(run in compared for run in runs if run["cell"] in MAIN):
        return ""
    return (
        "What is hollow in the picture ran on another card than dense: its speed does not compare."
    )


def plot(runs: Runs) -> Figure:
    """Loss against speed; what ran on another card than dense is hollow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    compared = _same_card(runs)
    others = [run for run in runs if run not in compared]
    cells = dict.fromkeys(run["cell"] for run in runs)
    for name in (name for name in cells if not name.endswith(LARGE_SUFFIX)):
        color = None
        for group, face in ((compared, None), (others, "none")):
            if not (x := values(group, name, "steps_per_second")):
                continue
            y = values(group, name, "loss")
            (line,) = axis.plot(x, y, "o", ms=5, color=color, markerfacecolor=face)
            if color is None:
                place, side = ((5, 4), "left") if group is compared else ((-5, -11), "right")
                axis.annotate(
                    name, (x[0], y[0]), xytext=place, textcoords="offset points", fontsize=8,
                    color=line.get_color(), ha=side,
                )  # fmt: skip
            color = line.get_color()
    axis.margins(x=0.15)
    axis.set_xlabel("steps per second (hollow: on another card than dense)")
    axis.set_ylabel("held-out loss, nats per byte")
    axis.grid(alpha=0.3)
    return figure


def _cells() -> list[Cell]:
    methods = ("adaptive", "dense", "local", "mean_pooled", *FIXED[1:], "flex_window")
    names = {"mean_pooled": "mean-pooled", "flex_window": "FlexAttention window"}

    def cell(attention: str, sparsity: float, large: bool = False) -> Cell:
        name = names.get(attention, attention)
        if attention != "dense":
            name += f" {sparsity:g}"
        settings = {"attention": attention, "sparsity": sparsity}
        if not large:
            return Cell(name, settings)
        return Cell(name + LARGE_SUFFIX, {**settings, "block_size": LARGE})

    main = [cell(method, 0.0 if method == "dense" else 0.9) for method in methods]
    main += [cell("adaptive", sparsity) for sparsity in (0.8, 0.95)]
    defaults = {"attention": "adaptive", "sparsity": 0.9, "defaults": True}
    main += [Cell(OURS, defaults)]
    large = [cell(method, 0.9, large=True) for method in methods if method != "dense"]
    large.append(cell("adaptive", 0.8, large=True))
    return [*main, *large]


CELLS = _cells()
# Names of the cells that the bars compare.
MAIN = [cell.name for cell in CELLS if not cell.name.endswith(LARGE_SUFFIX)]
NEEDED = (OURS, "dense", "strided 0.9")
EXPERIMENT = Experiment(
    "language_model",
    "On real text, adaptive attention as `train` sets it comes within 0.01 nats per byte of dense "
    "and beats every fixed and parameter-free pattern.",
    CELLS,
    execute,
    {
        "loss": "held-out loss (nats per byte)",
        "sparsity": "sparsity",
        "steps_per_second": "steps per second",
    },
    finding,
    plot,
    order,
    NEEDED,
)


def attempts(
    cells: Sequence[Cell], only: Sequence[str] | None, config: dict[str, Any], name: str
) -> tuple[Experiment, list[str]]:
    """Adaptive cells with another config, on a page of their own; and which of them to run."""
    changed = [
        replace(cell, name=f"{cell.name}, {name}", settings={**cell.settings, "config": config})
        for cell in cells
        if cell.settings["attention"] == "adaptive" and (only is None or cell.name in only)
    ]
    wanted = [cell.name for cell in changed]
    page = f"{EXPERIMENT.name}_attempts"
    before = dict.fromkeys(run["cell"] for run in load_runs(RESULTS / page))
    known = [Cell(each) for each in before if each not in wanted]
    experiment = replace(
        EXPERIMENT, name=page, cells=[*known, *changed], order=None, needed=None,
        finding=lambda runs: _listed(runs, [*before, *wanted]),
        promise="Other settings bring adaptive attention nearer to dense.",
    )  # fmt: skip
    return experiment, wanted


def main() -> int:
    """The command line: the harness's, and how the models run."""
    parser = option_parser(EXPERIMENT, __doc__)
    parser.add_argument("--graph", action="store_true", help="replay steps as CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="compile all but attention")
    parser.add_argument("--batch-size", type=int, help="of as many bytes in all; default: 4")
    parser.add_argument("--config", metavar="JSON", help="of adaptive layers, for an attempt")
    parser.add_argument("--name", help="what that attempt is called")
    parsed = parser.parse_args()
    if parsed.graph and parsed.device != "cuda":
        parser.error("--graph needs --device cuda")
    flags = ("graph", "compile")
    changes: dict[str, Any] = {name: True for name in flags if getattr(parsed, name)}
    if parsed.batch_size is not None:
        changes["batch_size"] = parsed.batch_size
    cells = [replace(cell, settings={**cell.settings, **changes}) for cell in CELLS]
    if (parsed.config is None) != (parsed.name is None):
        parser.error("--config and --name go together")
    experiment, only = replace(EXPERIMENT, cells=cells), parsed.only
    if parsed.config is not None:
        experiment, only = attempts(cells, only, json.loads(parsed.config), parsed.name)
    return conduct(
        [experiment], workers_of(parsed), only=only, seeds=parsed.seeds, quick=parsed.quick
    )


if __name__ == "__main__":
    sys.exit(main())
