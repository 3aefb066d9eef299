"""What ``dilated-attention train`` gives with nothing set, beside dense attention.

Trains the command's byte-level language model on text at several lengths, adaptive as it comes and
dense, three seeds each. ``results/train_defaults/`` holds ``runs.jsonl`` (one line a run) and
``README.md`` (the table). Runs on a CPU and on a GPU have a row each, and so have runs of other
defaults, which stay.

    python experiments/train_defaults.py                  # what is not there yet, at 512 bytes
    python experiments/train_defaults.py --lengths 1024 2048 --device cuda
    python experiments/train_defaults.py --lengths 1024 --text FILE_OR_FOLDER
    python experiments/train_defaults.py --quick          # seconds; nothing kept
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.cli.options import build_settings
from dilated_attention_pytorch.nn.block_sparse import LayerPass, observe_passes
from dilated_attention_pytorch.tasks.text import TextData
from dilated_attention_pytorch.train.language_model import LanguageModelTraining
from dilated_attention_pytorch.train.trainer import TEXT_DENSE_STEPS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from provenance import environment, where

RESULTS = Path(__file__).parent / "results" / "train_defaults"
METHODS = ("dense", "adaptive")
SEEDS = (0, 1, 2)
# What tells one set of defaults from another.
DEFAULTS = ("asked", "block_size", "local", "dense_start")


def named(length: int, attention: str, seed: int, device: str) -> dict[str, Any]:
    """What the user of the command names, and what its defaults are then."""
    run, _, _ = build_settings(options_of(length, attention, seed, device))
    config = run.config
    found = (
        config.base_sparsity,
        config.block_size,
        config.num_local_blocks,
        TEXT_DENSE_STEPS != 0,
    )
    values = found if attention == "adaptive" else (None,) * len(found)
    return {
        "length": length, "method": attention, "seed": seed, "on": kind(device),
        **dict(zip(DEFAULTS, values, strict=True)),
    }  # fmt: skip


def options_of(length: int, attention: str, seed: int, device: str) -> dict[str, Any]:
    """The options of the command; adaptive attention is what it takes unasked."""
    options = {"seq_len": length, "seed": seed, "device": device}
    return options if attention == "adaptive" else {**options, "attention": attention}


def train(
    length: int, attention: str, seed: int, paths: Sequence[str], device: str, quick: bool
) -> dict:
    """One run of the command, and what it gave on held-out text."""
    options = options_of(length, attention, seed, device)
    if paths:
        options["paths"] = tuple(paths)
    run, settings, _ = build_settings(options)
    run = dataclasses.replace(run, threads=torch.get_num_threads())
    if quick:
        run = dataclasses.replace(run, steps=2, batch_size=1, validation_sequences=1)
    text: TextData = settings.load(length)
    start, training = time.perf_counter(), LanguageModelTraining(run, text)
    while not training.done:
        last = training.step()
    found, chosen = training.validate(), chosen_share(training)
    return {
        "steps": run.steps,
        "loss": found.loss, "sparsity": found.sparsity, "training_sparsity": last.sparsity,
        "chosen": chosen, "text": text.source,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(kind(device)),
    }  # fmt: skip


def kind(device: str) -> str:
    """``"cpu"`` or ``"cuda"``, whichever of them it is."""
    return torch.device(device).type


def chosen_share(training: LanguageModelTraining) -> float | None:
    """Share of the tiles that held-out text reads which were chosen, not forced."""
    kept, forced = [], []

    def count(seen: LayerPass) -> None:
        assert seen.inputs is not None
        kept.append(int(seen.pattern.kv_num_blocks.sum()))
        rows = seen.inputs.candidates.forced.sum(-1).expand(seen.pattern.kv_num_blocks.shape)
        forced.append(int(rows.sum()))

    if training.trainer is None:
        return None
    with observe_passes(training.sparse_layers, count):
        training.validate()
    return 1 - sum(forced) / sum(kept)


def load(path: Path) -> list[dict[str, Any]]:
    """The finished runs; what the first lines do not say was the same in all of them."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    first = {
        "dense": {"on": "cpu", "local": None, "dense_start": None},
        "adaptive": {"on": "cpu", "local": 0, "dense_start": True},
    }
    return [first[run["method"]] | run for run in found]


def write_page(runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes the table."""
    lines = [
        "# What `train` gives with nothing set", "",
        "Held-out loss in nats per byte (mean, and each seed), and sparsity.", "",
        "| bytes | blocks of | local | dense start | asked | held out | chosen of what is read | "
        "adaptive | dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    adaptive = [run for run in runs if run["method"] == "adaptive"]
    for length, on, *values in sorted({_row(run) for run in adaptive}):
        here = [r for r in runs if (r["length"], r["on"]) == (length, on)]
        own = {
            "adaptive": [run for run in adaptive if _row(run) == (length, on, *values)],
            "dense": [run for run in here if run["method"] == "dense"],
        }
        if not own["dense"]:
            continue
        losses = []
        for method in ("adaptive", "dense"):
            found = [r["loss"] for r in sorted(own[method], key=lambda r: r["seed"])]
            each = " ".join(f"{loss:.3f}" for loss in found)
            losses.append(f"{statistics.mean(found):.3f} ({each})")
        sparse = own["adaptive"]
        lines.append(
            f"| {length:,}{' on a GPU' if on == 'cuda' else ''} | {sparse[0]['block_size']} | "
            f"{sparse[0]['local']} | {'yes' if sparse[0]['dense_start'] else 'no'} | "
            f"{sparse[0]['asked']:g} | "
            f"{statistics.mean(r['sparsity'] for r in sparse):.3f} | "
            f"{statistics.mean(r['chosen'] for r in sparse):.2f} | {' | '.join(losses)} |"
        )
    texts = "; ".join(sorted({run["text"] for run in runs}))
    lines += ["", f"{runs[0]['steps']} steps on {texts}.", "", *where(runs)]
    (folder / "README.md").write_text("\n".join(lines))


def _row(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["length"], run["on"], *(run[name] for name in DEFAULTS)


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--text", nargs="+", default=[], help="default: Python's own sources")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two steps, nothing kept")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) if parsed.quick else parsed.out
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "runs.jsonl"
        for length in parsed.lengths:
            for seed in parsed.seeds[:1] if parsed.quick else parsed.seeds:
                for method in parsed.only:
                    key = named(length, method, seed, parsed.device)
                    if any(all(run[k] == v for k, v in key.items()) for run in load(path)):
                        continue
                    found = train(length, method, seed, parsed.text, parsed.device, parsed.quick)
                    found = key | found
                    with path.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                    print(f"{length} {method} {seed}: {found['loss']:.4f}", flush=True)
        write_page(load(path), folder)


if __name__ == "__main__":
    main()
