"""A real pretrained model made sparse: distilled, evaluated against rivals, tuned end to end.

The model is SmolLM2-135M-Instruct. Selectors are distilled, and the model tuned, on the English
Debian handbook and the Python standard library's sources; perplexity is measured on prose (Debian's
``anarchism``) and documentation (the Python manual's sources), which nothing is trained on.

Every stage goes on where it stopped and ends after ``--minutes``::

    python experiments/fetch_smollm2.py             # once, online: model and texts into .cache
    python experiments/pretrained.py pack           # .cache/parts/a and b, to carry elsewhere
    python experiments/pretrained.py unpack         # there, offline
    python experiments/pretrained.py distill --block-size 64
    python experiments/pretrained.py evaluate --block-size 64
    python experiments/pretrained.py tune --attention dense
    python experiments/pretrained.py tune --sparsity 0.8
    python experiments/pretrained.py evaluate-tuned
    python experiments/pretrained.py report         # results, adapter and plot, to commit
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fetch_smollm2 import CACHE, GGUF_NAME, convert

RESULTS = Path(__file__).parent / "results" / "pretrained"
RUNS = CACHE / "pretrained"
MODEL = CACHE / "smollm2"
TRAINED_ON = ("debian-handbook", "stdlib")
MEASURED_ON = ("anarchism", "python3.11-doc")
# Bytes of each text: the rest would only cost time.
TEXT_BYTES = {"stdlib": 5_000_000, "anarchism": 3_000_000, "python3.11-doc": 3_000_000}
RIVALS = ("sink_window", "mean_pool", "antidiagonal", "min_max", "oracle")
# The selectors with their thresholds, and with the same number of blocks for every head.
OWN = ("adapter", "adapter:fixed")
BY_THRESHOLD = tuple(f"{name}:threshold" for name in RIVALS[1:])


def pack() -> None:
    """Splits model and texts into two folders of less than 64 MiB each."""
    parts = CACHE / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    content = (CACHE / GGUF_NAME).read_bytes()
    half = len(content) // 2
    for name, piece in (("a", content[:half]), ("b", content[half:])):
        (parts / name).mkdir(parents=True)
        (parts / name / "model.part").write_bytes(piece)
    for name in (*TRAINED_ON, *MEASURED_ON):
        text = (CACHE / "texts" / f"{name}.txt").read_bytes()[: TEXT_BYTES.get(name)]
        (parts / "b" / f"{name}.txt.xz").write_bytes(lzma.compress(text))
    # Reading the model's file needs this one pure Python package.
    wheels = parts / "b" / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
         "--disable-pip-version-check", "--dest", str(wheels), "gguf"],
        check=True,
    )  # fmt: skip
    for name in ("a", "b"):
        size = sum(p.stat().st_size for p in (parts / name).rglob("*") if p.is_file())
        print(f"{parts / name}: {size / 2**20:.1f} MiB")


def unpack() -> None:
    """Joins the two folders and converts the model; needs no network."""
    parts = CACHE / "parts"
    gguf = CACHE / GGUF_NAME
    gguf.write_bytes(b"".join((parts / x / "model.part").read_bytes() for x in ("a", "b")))
    (CACHE / "texts").mkdir(exist_ok=True)
    for packed in (parts / "b").glob("*.txt.xz"):
        (CACHE / "texts" / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    for wheel in (parts / "b" / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(CACHE / "python")
    sys.path.append(str(CACHE / "python"))
    print(convert(gguf, MODEL))


def text_paths(names: tuple[str, ...]) -> tuple[str, ...]:
    """Where the texts lie."""
    return tuple(str(CACHE / "texts" / f"{name}.txt") for name in names)


def training_texts() -> tuple[str, ...]:
    """The texts to train on in pieces of 100,000 characters: held-out text is whole files."""
    folder = RUNS / "train"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for name, path in zip(TRAINED_ON, text_paths(TRAINED_ON), strict=True):
            text = Path(path).read_bytes()[: TEXT_BYTES.get(name)].decode("utf-8", "replace")
            for number, start in enumerate(range(0, len(text), 100_000)):
                piece = folder / f"{name}-{number:03}.txt"
                piece.write_text(text[start : start + 100_000], encoding="utf-8")
    return (str(folder),)


def train(job: Any, folder: Path, stop: Callable[[], bool], changes: str) -> None:
    """Runs a job, or goes on with it, and saves what it made when it is done."""
    from dilated_attention_pytorch.integrations.transformers.job import PretrainedLoop
    from dilated_attention_pytorch.training.checkpoint import list_checkpoints

    if list_checkpoints(folder / "checkpoints"):
        loop = PretrainedLoop.resume(folder)
        if loop.job != job:
            raise SystemExit(f"{folder} holds a run with other settings; {changes}.")
    else:
        loop = PretrainedLoop.start(folder, job)
    print(f"{folder.name}: from step {loop.training.step_count} of {job.run.steps}", flush=True)
    shown = time.perf_counter()
    for result in loop.run(stop):
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(f"step {loop.training.step_count}: {result.result}", flush=True)
    print(json.dumps({"step": loop.training.step_count, **loop.latest}), flush=True)
    # A run that was stopped shows what it has so far.
    loop.training.save(folder)
    if loop.training.done:
        shutil.rmtree(folder / "checkpoints")
        (folder / "done.json").write_text(
            json.dumps({"seconds": loop.training.seconds, "job": job.to_dict(), **loop.latest})
        )


def distill(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """Distils selectors of one block size."""
    from dilated_attention_pytorch.integrations.transformers.distill import DistillRun
    from dilated_attention_pytorch.integrations.transformers.job import PretrainedJob
    from dilated_attention_pytorch.integrations.transformers.pretrained_training import (
        distilled_config,
    )
    from dilated_attention_pytorch.training.folder_loop import LoopSettings

    folder = RUNS / f"distill-{options.block_size}{options.name}"
    if (folder / "done.json").is_file():
        print(f"{folder.name} is done: {(folder / 'done.json').read_text()}")
        return
    changes = json.loads(options.config)
    config = distilled_config(block_size=options.block_size, base_sparsity=0.9, **changes)
    run = DistillRun(
        config=config, seq_len=options.length, steps=options.steps or 1000, target=options.target,
        learning_rate=options.lr, device=options.device, dtype=options.dtype,
    )  # fmt: skip
    job = PretrainedJob(
        run=run, model=str(MODEL), text=training_texts(),
        intervals=LoopSettings(log_every=20, validate_every=200, checkpoint_every=200),
    )  # fmt: skip
    train(job, folder, stop, "choose another --name")


def tune(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """Tunes selectors and weights at one sparsity, or the dense baseline."""
    from dilated_attention_pytorch.integrations.transformers.job import PretrainedJob
    from dilated_attention_pytorch.integrations.transformers.tune import TuneRun
    from dilated_attention_pytorch.training.folder_loop import LoopSettings

    dense = options.attention == "dense"
    folder = RUNS / tuned_name(options)
    if (folder / "done.json").is_file():
        print(f"{folder.name} is done: {(folder / 'done.json').read_text()}")
        return
    source = RUNS / f"distill-{options.block_size}{options.start}" / "adapter"
    run = TuneRun(
        seq_len=options.length, steps=options.steps or 400, train=options.train,
        attention=options.attention, adapter=None if dense else str(source),
        base_sparsity=options.sparsity, base_learning_rate=options.base_lr, learning_rate=5e-4,
        device=options.device, dtype=options.dtype,
    )  # fmt: skip
    job = PretrainedJob(
        run=run, model=str(MODEL), text=training_texts(),
        intervals=LoopSettings(log_every=10, validate_every=100, checkpoint_every=200),
    )  # fmt: skip
    train(job, folder, stop, "choose another --name")


def tuned_name(options: argparse.Namespace) -> str:
    """Folder of a tuned model."""
    kind = "dense" if options.attention == "dense" else f"{options.sparsity:g}"
    return f"tune-{options.train}-{kind}{options.name}"


def plan(options: argparse.Namespace) -> list[tuple[str, int, str, float]]:
    """Cells ``(text, length, method, sparsity)``, the ones that the bars need first."""
    longest = options.length
    first = [
        (text, longest, method, sparsity)
        for sparsity in (0.8, 0.9)
        for method in (*OWN, *RIVALS, *BY_THRESHOLD)
        for text in MEASURED_ON
    ]
    if options.block_size != 64:
        return first
    curve = [
        (text, longest, method, sparsity)
        for sparsity in (0.5, 0.95, 0.7)
        for method in (*OWN, *RIVALS, *BY_THRESHOLD)
        for text in MEASURED_ON
    ]
    shorter = [
        (text, length, method, sparsity)
        for length in (longest // 2, longest // 4)
        for sparsity in (0.8, 0.9)
        for method in ("adapter", "oracle:threshold", "antidiagonal:threshold", "oracle",
                       "antidiagonal", "sink_window")
        for text in MEASURED_ON
    ]  # fmt: skip
    return first + shorter + curve


def with_needles(cell: tuple[str, int, str, float], longest: int) -> bool:
    """Whether retrieval is measured in a cell, too; it costs more than all the rest."""
    text, length, method, sparsity = cell
    own = method in (*OWN, "sink_window", "antidiagonal", "oracle")
    return own and length == longest and text == MEASURED_ON[0] and sparsity == 0.9


def evaluation(
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    adapter: Any,
    depths: tuple[float, ...] = (),
) -> Any:
    """Measures on the held-out texts; the first windows of each are to calibrate on."""
    from dilated_attention_pytorch.integrations.transformers.evaluate import (
        Evaluation,
        EvaluationSettings,
    )
    from dilated_attention_pytorch.integrations.transformers.tokens import tokenize

    settings = EvaluationSettings(
        lengths=(options.length, options.length // 2, options.length // 4), sparsities=(0.9,),
        rivals=RIVALS, block_size=options.block_size, windows=options.windows, needles=4,
        repeats=0 if options.quick else 2, depths=depths, kept_mass=not options.quick,
    )  # fmt: skip
    texts = {
        name: tokenize(tokenizer, Path(path).read_text("utf-8", "replace"))
        for name, path in zip(MEASURED_ON, text_paths(MEASURED_ON), strict=True)
    }
    return Evaluation(model, tokenizer, texts, settings, adapter)


def evaluate(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """Measures distilled selectors and rivals, one line per cell."""
    from dilated_attention_pytorch.integrations.transformers import SelectorAdapter
    from dilated_attention_pytorch.integrations.transformers.tokens import (
        load_model,
        load_tokenizer,
    )

    folder = RUNS / f"distill-{options.block_size}{options.name}"
    target = RUNS / f"evaluate-{options.block_size}{options.name}.jsonl"
    done = list(_read(target))
    seen = {(r["text"], r["length"], r["method"], r["sparsity"]) for r in done}
    wanted = options.methods.split(",") if options.methods else None
    cells = [
        cell for cell in plan(options)
        if cell not in seen and (wanted is None or cell[2] in wanted)
    ]  # fmt: skip
    model = load_model(MODEL, device=options.device, dtype=options.weights)
    adapter = SelectorAdapter.from_pretrained(str(folder / "adapter"))
    tokenizer = load_tokenizer(MODEL)
    plain = evaluation(model, tokenizer, options, adapter)
    depths = () if options.quick else (0.1, 0.5, 0.9)
    needles = evaluation(model, tokenizer, options, adapter, depths)
    print(f"{len(cells)} cells to measure, {len(done)} done", flush=True)
    for cell in cells:
        if stop():
            break
        start = time.perf_counter()
        measured = needles if with_needles(cell, options.length) else plain
        row = measured.measure(*cell)
        row["dense"] = measured.dense(cell[0], cell[1])
        row["seconds"] = round(time.perf_counter() - start, 1)
        with target.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(*cell, f"ratio {row['ratio']:.4f} at {row['measured_sparsity']:.3f}", flush=True)


def evaluate_tuned(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    """Perplexity of every tuned model, relative to the tuned dense one."""
    from dilated_attention_pytorch.integrations.transformers import load_adapter
    from dilated_attention_pytorch.integrations.transformers.evaluate import perplexity
    from dilated_attention_pytorch.integrations.transformers.tiles import CountTiles
    from dilated_attention_pytorch.integrations.transformers.tokens import (
        load_model,
        load_tokenizer,
    )

    target = RUNS / "evaluate-tuned.jsonl"
    seen = {(r["run"], r["text"], r["length"]) for r in _read(target)}
    for folder in sorted(RUNS.glob("tune-*")):
        if not (folder / "done.json").is_file():
            continue
        place = folder / "model" if (folder / "model").is_dir() else MODEL
        model = load_model(place, device=options.device, dtype=options.weights)
        if (folder / "lora").is_dir():
            from peft import PeftModel

            # Low-rank changes go into the model's own layers.
            PeftModel.from_pretrained(model, str(folder / "lora"))
        adapted = None
        if (folder / "adapter").is_dir():
            adapted = load_adapter(model, folder / "adapter")
        measured = evaluation(model, load_tokenizer(MODEL), options, None)
        for text in MEASURED_ON:
            for length in measured.settings.lengths:
                if stop() or (folder.name, text, length) in seen:
                    continue
                with CountTiles(adapted) as tiles:
                    found = perplexity(model, measured.windows(text, length))
                row = {"run": folder.name, "text": text, "length": length, "perplexity": found,
                       "measured_sparsity": tiles.sparsity}  # fmt: skip
                with target.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def report() -> None:
    """Gathers results, the adapter and the plot where they are committed, and prints the bars."""
    from dilated_attention_pytorch.analysis.selector_plots import plot_perplexity

    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = [row for path in sorted(RUNS.glob("evaluate-[0-9]*.jsonl")) for row in _read(path)]
    tuned = list(_read(RUNS / "evaluate-tuned.jsonl"))
    runs = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(RUNS.glob("*/done.json"))
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"torch": torch.__version__, "device": device, "trained_on": TRAINED_ON,
             "measured_on": MEASURED_ON}  # fmt: skip
    content = {"about": about, "runs": runs, "rows": rows, "tuned": tuned, "bars": bars(rows)}
    (RESULTS / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    if rows:
        plot_perplexity(rows).savefig(RESULTS / "perplexity.png", dpi=120)
    for folder in RUNS.glob("distill-64"):
        shutil.copytree(folder / "adapter", RESULTS / "adapter", dirs_exist_ok=True)
        shutil.copy(folder / "metrics.jsonl", RESULTS / "distill.jsonl")
    for bar in content["bars"]:
        print(bar)
    dense = {(r["text"], r["length"]): r["perplexity"] for r in tuned if "-dense" in r["run"]}
    for row in tuned:
        if (row["text"], row["length"]) in dense:
            ratio = row["perplexity"] / dense[row["text"], row["length"]]
            print(row["run"], row["text"], row["length"], f"{ratio:.4f} of tuned dense",
                  f"at {row['measured_sparsity']:.3f}")  # fmt: skip


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per text, length, block size and sparsity: how much of the gap to the oracle is closed."""
    out = []
    keys = {(r["text"], r["length"], r["block_size"], r["sparsity"]) for r in rows}
    for key in sorted(keys):
        ratio = {
            r["method"]: r["ratio"]
            for r in rows
            if (r["text"], r["length"], r["block_size"], r["sparsity"]) == key
        }
        rivals = {m: x for m, x in ratio.items() if not m.startswith(("adapter", "oracle"))}
        if not any(x in ratio for x in OWN) or not rivals:
            continue
        best = min(rivals, key=rivals.__getitem__)
        entry = dict(zip(("text", "length", "block_size", "sparsity"), key, strict=True))
        entry |= {"best_rival": best, "rival": rivals[best]}
        for own, oracle in zip(OWN, ("oracle:threshold", "oracle"), strict=True):
            if own in ratio:
                entry[own] = ratio[own]
            if own in ratio and oracle in ratio and rivals[best] > ratio[oracle]:
                gap = rivals[best] - ratio[oracle]
                entry[f"{own}_closed"] = (rivals[best] - ratio[own]) / gap
        out.append(entry)
    return out


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text().splitlines():
            yield json.loads(line)


def main() -> None:
    """Runs one stage."""
    stages: dict[str, Callable[..., None]] = {
        "pack": pack, "unpack": unpack, "distill": distill, "evaluate": evaluate, "tune": tune,
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
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0, help="0: the stage's own number")
    parser.add_argument("--windows", type=int, default=4, help="measured per text and length")
    parser.add_argument("--quick", action="store_true", help="measure perplexity alone")
    parser.add_argument("--methods", default="", help="measure these alone, with commas between")
    parser.add_argument("--lr", type=float, default=1e-3, help="of distillation")
    parser.add_argument("--target", default="mass", choices=("mass", "gradient"))
    parser.add_argument("--config", default="{}", help="JSON changes of the distilled config")
    parser.add_argument("--name", default="", help="suffix of the run's folder")
    parser.add_argument("--start", default="", help="suffix of the distillation to tune from")
    parser.add_argument("--train", default="all", choices=("all", "lora", "selectors"))
    parser.add_argument("--attention", default="sparse", choices=("sparse", "dense"))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--base-lr", type=float, default=3e-5)
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * options.minutes
    if options.stage in ("pack", "unpack", "report"):
        stages[options.stage]()
    else:
        stages[options.stage](options, lambda: time.perf_counter() > end)


if __name__ == "__main__":
    main()
