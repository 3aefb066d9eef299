"""Which ways of choosing blocks learn to find a needle?

Trains the needle task (``dilated_attention_pytorch.tasks.needle``) with every estimator, scorer,
fixed pattern and dense attention, at 2 scored blocks of 31, and writes:

* ``results/needle/runs.jsonl``: one line per finished run, with its curve, hardware and versions;
* ``results/needle/table.md`` and ``results/needle/plot.png``.

    python experiments/needle.py --jobs 2                  # everything that is not there yet
    python experiments/needle.py --only adaptive --layers 1 --seeds 0
    python experiments/needle.py --quick --jobs 2          # a minute: two steps each, nothing kept

Finished runs are skipped, so an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dilated_attention_pytorch.tasks.needle import (
    NeedleRun,
    build_needle_model,
    needle_config,
    train_needle,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from provenance import environment, where

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "needle"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: Its key in the results.
        about: What it is, for the table.
        attention: A name of ``build_attention``.
        config: Changes to the default configuration.
        run: Changes to the default run.
        seeds: Seeds that are run unless asked otherwise.
    """

    name: str
    about: str
    attention: str = "adaptive"
    config: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)


MLP = {"scorer": "mlp", "hidden_dim": 128, "num_layers": 2}
SLOW = {"scorer_learning_rate": 0.25, "sparsity_warmup": 0.2}

BF16 = {"dtype": "bfloat16"}

ONE = (0,)
GROUPED = {"num_heads": 4, "num_kv_heads": 2}
FRESH = (0, 1, 2, 3, 4, 5, 9, 10, 11)  # 6 to 8 helped to choose the recipe, 9 to 11 nothing
VARIANTS = (
    Variant("dense", "dense attention (upper bound)", "dense"),
    Variant("adaptive", "**adaptive, defaults** (mass target, bilinear, mean + max)", seeds=FRESH),
    Variant("gumbel", "estimator gumbel (score as logit bias)", config={"estimator": "gumbel"}),
    Variant("soft", "estimator soft (dense relaxation)", config={"estimator": "soft"},
            seeds=(0, 1)),
    Variant("straight_through", "estimator straight-through",
            config={"estimator": "straight_through"}),
    Variant("mlp", "MLP scorer (guide), 2 x 128 hidden, trained like the bilinear one",
            config=MLP),
    Variant("mlp_slow", "the same, its learning rate / 4, sparsity warm-up", config=MLP,
            run=SLOW),
    Variant("towers", "bilinear with 2-layer towers of 128",
            config={"hidden_dim": 128, "num_layers": 2}, seeds=ONE),
    Variant("warmup", "defaults with a sparsity warm-up (dense for 20 % of the steps, then 20 %)",
            run={"sparsity_warmup": 0.2}, seeds=ONE),
    Variant("mean_pooling", "mean summaries alone", config={"pooling": ["mean"]}, seeds=ONE),
    Variant("attention_pooling", "mean + attention pooling",
            config={"pooling": ["mean", "attention"]}, seeds=ONE),
    Variant("no_exploration", "no random blocks", config={"num_explore_blocks": 0}, seeds=ONE),
    Variant("weight_1", "selector_weight 1", config={"selector_weight": 1.0}, seeds=ONE),
    Variant("fixed_temperature", "learnable_temperature off",
            config={"learnable_temperature": False}, seeds=ONE),
    Variant("shared_pattern", "one pattern for all heads", config={"share_across_heads": True},
            seeds=ONE),
    Variant("shared_layers", "one choice for both layers", run={"layers_per_selection": 2}),
    Variant("grouped", "4 heads on 2 KV heads, a choice per head", run=GROUPED),
    Variant("shared_kv_group", "the same, a choice per KV head",
            config={"share_within_kv_group": True}, run=GROUPED),
    Variant("hard", "hard_sparsity (no noise, no random blocks)", config={"hard_sparsity": True},
            seeds=ONE),
    Variant("one_block", "1 scored block", config={"scored_blocks": 1}, seeds=ONE),
    Variant("past", "query_scope past (strictly causal choice)", config={"query_scope": "past"},
            seeds=ONE),
    Variant("triton_bf16", "defaults, bfloat16, Triton kernels", run=BF16 | {"backend": "triton"}),
    Variant("gather_bf16", "defaults, bfloat16, PyTorch path", run=BF16 | {"backend": "gather"}),
    Variant("gather", "defaults, float32, PyTorch path", run={"backend": "gather"}),
    Variant("local", "fixed: local window", "local"),
    Variant("dilated", "fixed: dilated (LongNet)", "dilated"),
    Variant("strided", "fixed: strided", "strided"),
    Variant("hierarchical", "fixed: hierarchical", "hierarchical"),
    Variant("sink_local", "fixed: sink + local", "sink_local"),
    Variant("random", "fixed: random", "random"),
)  # fmt: skip


def make_run(variant: Variant, num_layers: int, seed: int, steps: int, device: str) -> NeedleRun:
    """The run of one cell of the table."""
    return NeedleRun(
        variant.attention,
        needle_config(**variant.config),
        num_layers=num_layers,
        seed=seed,
        device=device,
        steps=steps,
        **variant.run,
    )


def execute(
    variant: Variant, num_layers: int, seed: int, steps: int, device: str
) -> dict[str, Any]:
    """Trains one run, in a process of its own."""
    torch.set_num_threads(1)
    run = make_run(variant, num_layers, seed, steps, device)
    model = build_needle_model(run)
    curve = [asdict(progress) for progress in train_needle(run, model)]
    return {
        "variant": variant.name,
        "num_layers": num_layers,
        "seed": seed,
        "steps": steps,
        "batch_size": run.batch_size,
        "learning_rate": run.learning_rate,
        "accuracy": curve[-1]["accuracy"],
        "recall": curve[-1]["recall"],
        "sparsity": curve[-1]["sparsity"],
        "seconds": curve[-1]["seconds"],
        "curve": curve,
        "config": run.config.to_dict(),
        "settings": variant.run,
        "environment": environment(device),
    }


def load_runs(path: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def sweep(
    cells: list[tuple[Variant, int, int]], steps: int, device: str, jobs: int
) -> Iterator[dict[str, Any]]:
    """Runs cells in ``jobs`` processes and yields them as they finish."""
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(execute, *cell, steps, device) for cell in cells]
        for future in as_completed(futures):
            yield future.result()


def write_table(runs: list[dict[str, Any]], path: Path) -> None:
    """Writes accuracies by variant and depth as Markdown."""
    cells: dict[tuple[str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        cells[run["variant"], run["num_layers"]][run["seed"]] = run
    depths = sorted({run["num_layers"] for run in runs})
    lines = ["| blocks chosen by | " + " | ".join(f"{n} layer(s)" for n in depths) + " |"]
    lines.append("|---|" + "---|" * len(depths))
    for variant in VARIANTS:
        row = []
        for depth in depths:
            found = cells.get((variant.name, depth), {})
            seeds = sorted(found)
            cell = " ".join(f"{found[seed]['accuracy']:.3f}" for seed in seeds) or "-"
            if seeds != list(range(len(seeds))):
                cell += f" (seeds {' '.join(map(str, seeds))})"
            row.append(cell)
        if any(cell != "-" for cell in row):
            lines.append(f"| {variant.about} | " + " | ".join(row) + " |")
    steps = sorted({run["steps"] for run in runs})
    note = (
        "Accuracy on 256 held-out sequences by seed, from 0 on unless named; 512 tokens in 32 "
        "blocks, the diagonal block and 2 scored blocks (of up to 31) kept in every row unless "
        f"said otherwise; {', '.join(map(str, steps))} steps of {NeedleRun.batch_size} "
        "sequences."
    )
    path.write_text("\n".join([*lines, "", note, "", *where(runs)]))


def write_plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Plots the mean accuracy of every variant, with the seeds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths = sorted({run["num_layers"] for run in runs})
    figure, axes = plt.subplots(1, len(depths), figsize=(6.5 * len(depths), 7), squeeze=False)
    for axis, depth in zip(axes[0], depths, strict=True):
        rows = []
        for variant in VARIANTS:
            values = [
                run["accuracy"]
                for run in runs
                if run["variant"] == variant.name and run["num_layers"] == depth
            ]
            if values:
                rows.append((variant, values))
        rows.sort(key=lambda row: mean(row[1]))
        for place, (variant, values) in enumerate(rows):
            fixed = variant.attention not in ("adaptive", "dense")
            color = "#999999" if fixed else "#0072b2"
            if variant.name in ("adaptive", "dense"):
                color = "#d55e00" if variant.name == "adaptive" else "#333333"
            axis.barh(place, mean(values), color=color, alpha=0.55)
            axis.plot(values, [place] * len(values), "o", color=color, markersize=4)
        axis.set_yticks(range(len(rows)), [variant.name for variant, _ in rows])
        axis.set_xlim(0, 1)
        axis.set_xlabel("accuracy (bar: mean, dots: seeds)")
        axis.set_title(f"needle task, {depth} layer(s)")
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Runs what is asked for and not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS])
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of each variant")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two steps each, nothing kept")
    arguments = parser.parse_args()
    out, steps = arguments.out, arguments.steps
    if arguments.quick:
        out, steps = Path(tempfile.mkdtemp(prefix="needle-")), 2
        arguments.seeds, arguments.layers = [0], [1]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "runs.jsonl"
    done = {(r["variant"], r["num_layers"], r["seed"]) for r in load_runs(log)}
    wanted = [v for v in VARIANTS if arguments.only is None or v.name in arguments.only]
    if arguments.only is None and arguments.device != "cuda":
        wanted = [v for v in wanted if v.run.get("backend") != "triton"]
    cells = [
        (variant, depth, seed)
        for depth in sorted(arguments.layers, reverse=True)
        for variant in wanted
        for seed in arguments.seeds or variant.seeds
        if (variant.name, depth, seed) not in done
    ]
    for number, result in enumerate(sweep(cells, steps, arguments.device, arguments.jobs), start=1):
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"[{number}/{len(cells)}] {result['variant']} layers={result['num_layers']} "
            f"seed={result['seed']} accuracy={result['accuracy']:.3f} recall={result['recall']} "
            f"({result['seconds']:.0f} s)",
            flush=True,
        )
    runs = load_runs(log)
    write_table(runs, out / "table.md")
    write_plot(runs, out / "plot.png")
    print(f"wrote {out}/table.md and plot.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
