"""A real pretrained model made sparse: fitted, evaluated against baselines, tuned end to end.

The model is SmolLM2-135M-Instruct. Selectors are fitted (the recorded ones were distilled), and the
model tuned, on prose (three books that Debian packages, seven novels, the Jargon File, addresses of
American presidents) and on as much of manuals (Git, Linux, Perl) and of the Python standard
library's sources; perplexity is measured on prose (Debian's ``anarchism``) and documentation (the
Python manual's sources), which nothing is trained on.

Every stage goes on where it stopped and ends after ``--minutes``; a training that ends so is saved
as it is, its learning rate not yet at the end. Several processes may run at once::

    python experiments/fetch_smollm2.py             # once, online: model and texts into .cache
    python experiments/pretrained.py pack           # .cache/parts/a, b, c, to carry elsewhere
    python experiments/pretrained.py unpack         # there, offline
    python experiments/pretrained.py distill --block-size 64
    python experiments/pretrained.py evaluate --block-size 64
    python experiments/pretrained.py allot              # budgets that differ between layers
    python experiments/pretrained.py tune --attention dense --steps 1000
    python experiments/pretrained.py tune --sparsity 0.8 --steps 1000
    python experiments/pretrained.py evaluate-tuned
    python experiments/pretrained.py report         # results, adapter and plot, to commit
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.selection.budget import most_sparse
from pretrained_report import read_lines, report
from pretrained_texts import (
    MEASURED_ON,
    MODEL,
    RUNS,
    TEXT_BYTES,
    TRAINED_ON,
    pack,
    text_paths,
    training_texts,
    unpack,
)

BASELINES = ("sink_window", "mean_pool", "antidiagonal", "min_max", "oracle")
# The selectors with their thresholds, and with the same number of blocks for every head.
OWN = ("adapter", "adapter:fixed")
BY_THRESHOLD = tuple(f"{name}:threshold" for name in BASELINES[1:])
# Thresholds above a share of the even budget.
WITH_FLOOR = ("adapter", "oracle", "antidiagonal")
# Thresholds with shares of the layers by what sparsity costs in each, and the selectors without.
ALLOTTED = ("adapter:threshold", "oracle:allotted", "antidiagonal:allotted")


# By how much the measured sparsity may exceed the nominal one.
TOLERANCE = 0.0005


def train(job: Any, folder: Path, stop: Callable[[], bool], about: dict[str, Any]) -> None:
    """Runs a job, or goes on with it, and saves what it made so far."""
    from dilated_attention_pytorch.hf.job import PretrainedLoop
    from dilated_attention_pytorch.train.checkpoint import list_checkpoints

    if list_checkpoints(folder / "checkpoints"):
        loop = PretrainedLoop.resume(folder)
        if loop.job != job:
            raise SystemExit(f"{folder} holds a run with other settings; choose another --name.")
    else:
        loop = PretrainedLoop.start(folder, job)
    training, start = loop.training, time.perf_counter()
    first, shown = training.step_count, start
    print(f"{folder.name}: from step {first} of {job.run.steps}", flush=True)
    for result in loop.run(stop):
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            pace = (shown - start) / (training.step_count - first)
            left = pace * (job.run.steps - training.step_count) / 60
            print(f"step {training.step_count}: {result.result}, {pace:.3f} s a step with "
                  f"measuring, {left:.1f} minutes left", flush=True)  # fmt: skip
    if training.done or job.to_dict()["kind"] == "tune":
        training.save(folder)
    done = {"seconds": training.seconds, "job": job.to_dict(), **about, **loop.latest}
    if training.done:
        shutil.rmtree(folder / "checkpoints")
    else:
        done["stopped_at_step"] = training.step_count
    (folder / "done.json").write_text(json.dumps(done))
    print(json.dumps({"step": training.step_count, **loop.latest}), flush=True)


def is_done(folder: Path) -> bool:
    """Whether all steps of a run are done."""
    path = folder / "done.json"
    if not path.is_file() or "stopped_at_step" in json.loads(path.read_text()):
        return False
    print(f"{folder.name} is done: {path.read_text()}")
    return True


def origin(options: argparse.Namespace) -> dict[str, Any]:
    """What every recorded result says of where it comes from."""
    cuda = options.device.startswith("cuda")
    return {
        "commit": options.commit, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(options.device) if cuda else "CPU",
    }  # fmt: skip


def distill(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """Fits selectors of one block size."""
    from dilated_attention_pytorch.hf.job import PretrainedJob
    from dilated_attention_pytorch.hf.train_selectors import FitRun, distilled_config
    from dilated_attention_pytorch.train.loop import LoopSettings

    folder = RUNS / f"distill-{options.block_size}{options.name}"
    if is_done(folder):
        return
    changes = json.loads(options.config)
    settings = {"block_size": options.block_size, "base_sparsity": 0.9, "num_sink_blocks": 1}
    config = distilled_config(**settings | changes)
    run = FitRun(config=config, seq_len=options.length, device=options.device, dtype=options.dtype)
    job = PretrainedJob(
        run=run, model=str(MODEL), text=training_texts(),
        intervals=LoopSettings(log_every=1, checkpoint_every=1),
    )  # fmt: skip
    train(job, folder, stop, {**origin(options), "trained_on": TRAINED_ON})


def allot(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """Measures what sparsity costs in each layer, on held-out training windows.

    The selectors with these costs are another adapter, ``distill-<blocks><name>-allotted``.
    """
    from dilated_attention_pytorch.hf.layer_shares import SPARSITIES, AllotJob, Allotment

    source = RUNS / f"distill-{options.block_size}{options.start}" / "adapter"
    folder = RUNS / f"distill-{options.block_size}{options.name}-allotted"
    if is_done(folder):
        return
    job = AllotJob(
        model=str(MODEL), adapter=str(source), text=training_texts(),
        lengths=(options.length, options.length // 2), windows=options.windows,
        background=options.background or None, device=options.device, dtype=options.weights,
        sparsities=sparsities_of(options) or SPARSITIES,
    )  # fmt: skip
    allotment, start = Allotment(job, folder), time.perf_counter()
    for length, layer in allotment.steps():
        costs = allotment.measured[length][layer]
        print(length, layer, *(f"{cost:.5f}" for cost in costs), flush=True)
        if stop():
            return
    for costs in allotment.costs():
        for sparsity in (0.8, 0.9):
            shares = {layer: round(x, 3) for layer, x in costs.allot(sparsity).items()}
            print(costs.length, sparsity, shares)
    done = {"seconds": time.perf_counter() - start, "job": asdict(job), **origin(options)}
    (folder / "done.json").write_text(json.dumps({**done, "trained_on": TRAINED_ON}))


def sparsities_of(options: argparse.Namespace) -> tuple[float, ...]:
    """Those that the command line names; none if it names none."""
    return tuple(float(x) for x in options.sparsities.split(",") if x)


def tune(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """Tunes selectors and weights at one sparsity, or the dense baseline."""
    from dilated_attention_pytorch.hf.job import PretrainedJob
    from dilated_attention_pytorch.hf.train_selectors import TuneRun
    from dilated_attention_pytorch.train.loop import LoopSettings

    dense = options.attention == "dense"
    folder = RUNS / tuned_name(options)
    if is_done(folder):
        return
    run = TuneRun(
        seq_len=options.length, batch_size=options.batch, steps=options.steps or 400,
        train=options.train, attention=options.attention,
        adapter=None if dense else starting_adapter(options, folder),
        base_sparsity=options.sparsity, base_learning_rate=options.base_lr, learning_rate=5e-4,
        selector_every=options.selector_every, device=options.device, dtype=options.dtype,
    )  # fmt: skip
    job = PretrainedJob(
        run=run, model=str(MODEL), text=training_texts(),
        # A checkpoint takes 1.6 GB.
        intervals=LoopSettings(log_every=10, validate_every=250, checkpoint_every=1000),
    )  # fmt: skip
    train(job, folder, stop, {**origin(options), "trained_on": TRAINED_ON})


def starting_adapter(options: argparse.Namespace, folder: Path) -> str:
    """The fitted selectors to tune from, with the floor that is asked for."""
    from dilated_attention_pytorch.hf.adapter import SelectorAdapter

    source = RUNS / f"distill-{options.block_size}{options.start}" / "adapter"
    if not options.floor:
        return str(source)
    start = folder / "start"
    adapter = SelectorAdapter.read(source).with_budget("threshold", options.floor)
    adapter.save_pretrained(start)
    return str(start)


def tuned_name(options: argparse.Namespace) -> str:
    """Folder of a tuned model."""
    if options.attention == "dense":
        return f"tune-{options.train}-dense{options.name}"
    blocks = "" if options.block_size == 64 else f"-blocks{options.block_size}"
    floor = f"-floor{options.floor:g}" if options.floor else ""
    return f"tune-{options.train}-{options.sparsity:g}{blocks}{floor}{options.name}"


def plan(options: argparse.Namespace) -> list[tuple[str, int, str, float]]:
    """Cells ``(text, length, method, sparsity)``, the ones that the bars need first."""
    longest, *shorter = lengths_of(options)
    floors = tuple(f"{name}:floor{options.floor or 0.5:g}" for name in WITH_FLOOR)
    every = (*OWN, *BASELINES, *BY_THRESHOLD, *floors, *ALLOTTED)
    grid = [
        ((longest,), (0.8, 0.9)),
        (shorter, (0.9, 0.8)),
        ((longest, *shorter), (0.7, 0.5, 0.95)),
    ]
    return [
        (text, length, method, sparsity)
        for lengths, sparsities in grid
        for length in lengths
        for sparsity in sparsities
        if sparsity <= most_sparse(length, options.block_size, 1, 0)
        for method in every
        for text in MEASURED_ON
    ]


def lengths_of(options: argparse.Namespace) -> tuple[int, ...]:
    """Tokens per window, the longest first."""
    named = tuple(int(x) for x in options.lengths.split(",") if x)
    return tuple(sorted(named or (options.length // n for n in (1, 2, 4)), reverse=True))


def with_needles(cell: tuple[str, int, str, float], longest: int) -> bool:
    """Whether retrieval is measured in a cell, too; it costs more than all the rest."""
    text, length, method, sparsity = cell
    own = method in (*OWN, "sink_window", "antidiagonal", "oracle")
    return own and length == longest and text == MEASURED_ON[0] and sparsity == 0.9


def measured_texts(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Tokens of the held-out texts; the first windows of each are to calibrate on."""
    from dilated_attention_pytorch.hf.model_folder import tokenize

    return {
        name: tokenize(tokenizer, path.read_bytes()[: TEXT_BYTES[name]].decode("utf-8", "replace"))
        for name, path in zip(MEASURED_ON, map(Path, text_paths(MEASURED_ON)), strict=True)
    }


def settings_of(options: argparse.Namespace, **changes: Any) -> Any:
    """Lengths and windows to measure; perplexity alone if nothing else is asked for."""
    from dilated_attention_pytorch.hf.evaluate import EvaluationSettings

    settings: dict[str, Any] = {
        "lengths": lengths_of(options), "sparsities": (0.9,), "baselines": BASELINES,
        "windows": options.windows, "block_size": options.block_size, "kept_mass": False,
        "prefixes": 0,
        "repeats": 0, "tolerance": TOLERANCE,
    }  # fmt: skip
    return EvaluationSettings(**(settings | changes))


def evaluate(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """Measures fitted selectors and baselines, one line per cell."""
    from dilated_attention_pytorch.hf.adapter import SelectorAdapter
    from dilated_attention_pytorch.hf.evaluate import Evaluation
    from dilated_attention_pytorch.hf.model_folder import (
        load_model,
        load_tokenizer,
    )
    from dilated_attention_pytorch.hf.retrieval import RetrievalSettings, RetrievalSuite

    folder = RUNS / f"distill-{options.block_size}{options.name}"
    target = RUNS / f"evaluate-{options.block_size}{options.name}.jsonl"
    done = read_lines(target)
    seen = {(r["text"], r["length"], r["method"], r["sparsity"]) for r in done}
    wanted = options.methods.split(",") if options.methods else None
    sparsities = sparsities_of(options)
    cells = [
        cell for cell in plan(options)
        if cell not in seen and (wanted is None or cell[2] in wanted)
        and (not sparsities or cell[3] in sparsities)
    ]  # fmt: skip
    model = load_model(MODEL, device=options.device, dtype=options.weights)
    adapter = SelectorAdapter.read(folder / "adapter")
    tokenizer = load_tokenizer(MODEL)
    texts = measured_texts(tokenizer)
    more = {} if options.quick else {"kept_mass": True, "repeats": 2}
    evaluation = Evaluation(model, texts, settings_of(options, **more), adapter)
    asked = RetrievalSettings(tasks=("needle",), samples=12)
    suite = None if options.quick else RetrievalSuite(evaluation, tokenizer, asked)
    print(f"{len(cells)} cells to measure, {len(done)} done", flush=True)
    for cell in cells:
        if stop():
            break
        start = time.perf_counter()
        row = evaluation.measure(*cell)
        row["dense"] = evaluation.dense(cell[0], cell[1])
        if suite is not None and with_needles(cell, lengths_of(options)[0]):
            (found,) = suite.measure(*cell)
            row |= {"needle": found["score"], "needle_dense": found["dense"]}
        row |= {"seconds": round(time.perf_counter() - start, 1), **origin(options)}
        append(target, row)
        print(*cell, f"ratio {row['ratio']:.4f} at {row['measured_sparsity']:.4f}", flush=True)


def evaluate_tuned(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """Perplexity of the tuned models, calibrated on the first windows of each text."""
    target = RUNS / "evaluate-tuned.jsonl"
    for folder in sorted(RUNS.glob("tune-*")):
        chosen = fnmatch.fnmatch(folder.name, options.runs)
        if not chosen or not (folder / "done.json").is_file():
            continue
        about = json.loads((folder / "done.json").read_text())
        run = about["job"]["run"]
        steps = about.get("stopped_at_step", run["steps"])
        seen = {(r["run"], r["text"], r["length"], r["steps"]) for r in read_lines(target)}
        measured = None
        for text in MEASURED_ON:
            for length in lengths_of(options):
                if stop() or (folder.name, text, length, steps) in seen:
                    continue
                measured = measured or tuned_evaluation(folder, options)
                row: dict[str, Any] = {"run": folder.name, "steps": steps}
                if measured.adapter is None:
                    dense = measured.dense(text, length)["perplexity"]
                    row |= {"text": text, "length": length, "perplexity": dense,
                            "measured_sparsity": 0.0}  # fmt: skip
                else:
                    row |= measured.measure(text, length, "adapter", run["base_sparsity"])
                    # Relative to the same weights without selectors, not to those tuned dense.
                    row["ratio_of_own_dense"] = row.pop("ratio")
                row |= origin(options)
                append(target, row)
                print(json.dumps(row), flush=True)


def tuned_evaluation(folder: Path, options: argparse.Namespace) -> Any:
    """An evaluation of a tuned model with its selectors, if it has any."""
    from dilated_attention_pytorch.hf.adapter import SelectorAdapter
    from dilated_attention_pytorch.hf.evaluate import (
        Evaluation,
        block_size_of,
    )
    from dilated_attention_pytorch.hf.model_folder import (
        load_lora,
        load_model,
        load_tokenizer,
    )

    place = folder / "model" if (folder / "model").is_dir() else MODEL
    model = load_model(place, device=options.device, dtype=options.weights)
    if (folder / "lora").is_dir():
        # Low-rank changes go into the model's own layers.
        load_lora(model, folder / "lora")
    adapter, size = None, options.block_size
    if (folder / "adapter").is_dir():
        adapter = SelectorAdapter.read(folder / "adapter")
        size = block_size_of(adapter)
    settings = settings_of(options, block_size=size)
    return Evaluation(model, measured_texts(load_tokenizer(MODEL)), settings, adapter)


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a line, without what was not measured."""

    def measured(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: measured(value) if isinstance(value, dict) else value
            for name, value in values.items()
            if value == value
        }

    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(measured(row), allow_nan=False) + "\n")


def commit() -> str:
    """The repository's commit, ``+`` with changes, or nothing outside a repository."""
    if shutil.which("git") is None:
        return ""
    found = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip()


def main() -> None:
    """Runs one stage."""
    stages: dict[str, Callable[..., None]] = {
        "pack": pack, "unpack": unpack, "distill": distill, "allot": allot, "evaluate": evaluate,
        "tune": tune,
        "evaluate-tuned": evaluate_tuned, "report": report,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("stage", choices=tuple(stages))
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after as many")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of training")
    parser.add_argument("--weights", default="bfloat16" if cuda else "float32", help="of measuring")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the longest window")
    parser.add_argument(
        "--lengths", default="", help="tokens to measure at (default: --length, half, a quarter)"
    )
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0, help="of tuning; 0: 400")
    parser.add_argument("--batch", type=int, default=1, help="windows per step of training")
    parser.add_argument("--windows", type=int, default=4, help="measured per text and length")
    parser.add_argument("--quick", action="store_true", help="measure perplexity alone")
    parser.add_argument("--methods", default="", help="measure these alone, with commas between")
    parser.add_argument("--sparsities", default="", help="measure these alone, likewise")
    parser.add_argument("--runs", default="tune-*", help="pattern of the tuned runs to measure")
    parser.add_argument("--config", default="{}", help="JSON changes of the fitted config")
    parser.add_argument("--name", default="", help="suffix of the run's folder")
    parser.add_argument("--start", default="", help="suffix of the fit to tune from")
    parser.add_argument("--train", default="all", choices=("all", "lora", "selectors"))
    parser.add_argument("--attention", default="sparse", choices=("sparse", "dense"))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--base-lr", type=float, default=3e-5)
    parser.add_argument(
        "--floor",
        type=float,
        default=0.0,
        help="threshold_floor to tune with, or to measure (0: 0.5 there)",
    )
    parser.add_argument("--selector-every", type=int, default=8)
    parser.add_argument(
        "--background", type=float, default=0.0, help="sparsity of the other layers (0: dense)"
    )
    parser.add_argument("--commit", default=commit(), help="to record beside the results")
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * options.minutes
    if options.stage in ("pack", "unpack", "report"):
        stages[options.stage]()
    else:
        stages[options.stage](options, lambda: time.perf_counter() > end)


if __name__ == "__main__":
    main()
