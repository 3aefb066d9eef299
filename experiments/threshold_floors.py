"""How many blocks should rows of a converted model read: thresholds, floors, an even budget?

Perplexity of fitted selectors, relative to dense attention, under several rules. The recorded ones
had one step of distillation beside (``distill --steps 1``, which left since).
``results/threshold_floors/`` holds ``runs.jsonl`` and ``README.md``.

    python experiments/fetch_smollm2.py
    dilated-attention distill --model .cache/smollm2 --out .cache/fitted --text \
        .cache/texts/cfi-en.txt .cache/texts/debian-handbook.txt .cache/texts/jargon-text.txt
    python experiments/threshold_floors.py --lengths 1024 2048
    python experiments/threshold_floors.py --peaks

With ``--peaks``: thresholds above the floor of ``distill``, with a part by peaks. They are found on
the measured windows themselves, so that all settings read as much.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dilated_attention_pytorch.hf import Evaluation, EvaluationSettings, SelectorAdapter, calibrate
from dilated_attention_pytorch.hf.evaluate import perplexity
from dilated_attention_pytorch.hf.observe import CountTiles
from fetch_smollm2 import CACHE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from provenance import environment, where

RESULTS = Path(__file__).parent / "results" / "threshold_floors"
RULES = (
    "adapter:threshold", "adapter:floor0.5", "adapter:floor0.8", "adapter:fixed",
    "antidiagonal:threshold", "antidiagonal", "sink_window", "oracle",
)  # fmt: skip
# Scores every so many queries, and the part that goes by peaks.
PEAKS = ((4, 0.0), (2, 0.0), (2, 0.25), (2, 0.5))
FLOOR, SPARSITIES = 0.8, (0.9, 0.8)
BYTES = 400_000


def load(folder: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    path = folder / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def with_peaks(adapter: SelectorAdapter, stride: int, share: float) -> SelectorAdapter:
    """The same maps with other settings."""
    configs = {
        n: replace(config, query_stride=stride, peak_share=share)
        for n, config in adapter.configs.items()
    }
    return SelectorAdapter(configs, adapter.tensors, adapter.base, adapter.versions)


def rule_of(stride: int, share: float) -> str:
    """How a setting of ``--peaks`` is called."""
    return f"query_stride {stride}, peak_share {share:g}"


def measure_peaks(
    evaluation: Evaluation, adapter: SelectorAdapter, length: int, sparsity: float
) -> dict[str, float]:
    """As :meth:`Evaluation.measure`, with thresholds that meet the sparsity where it measures."""
    windows = evaluation.windows("moby-dick", length)
    with adapter.with_budget("threshold", FLOOR).apply(evaluation.model) as adapted:
        adapted.set_base_sparsity(sparsity)
        text = windows[:, :-1].flatten()
        calibrate(adapted, text, sparsity, lengths=(length,), windows=len(windows))
        with CountTiles(adapted) as tiles:
            found = perplexity(evaluation.model, windows)
    dense = evaluation.dense("moby-dick", length)["perplexity"]
    return {"measured_sparsity": tiles.sparsity, "ratio": found / dense}


def table(runs: Sequence[Mapping[str, Any]], rules: Sequence[str]) -> list[str]:
    """A rule a row, a length and sparsity a column."""
    runs = [run for run in runs if run["rule"] in rules]
    columns = sorted({(run["length"], run["sparsity"]) for run in runs})
    lines = [
        "| rule | " + " | ".join(f"{n:,}, {x:g}" for n, x in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]  # fmt: skip
    for rule in rules:
        cells = []
        for column in columns:
            own = [r for r in runs if (r["rule"], r["length"], r["sparsity"]) == (rule, *column)]
            words = [
                f"{r['ratio']:.3f}"
                + (f" ({r['measured']:.3f})" if abs(r["measured"] - column[1]) > 0.006 else "")
                for r in own
            ]
            cells.append(words[0] if words else "")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return lines


def write_page(runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes both tables."""
    lines = [
        "# Thresholds, floors and even budgets", "",
        "Perplexity / dense attention's of SmolLM2-135M-Instruct, two windows of *Moby Dick*, "
        "blocks of 32, selectors fitted at 2,048 tokens (one step of distillation). In brackets "
        "the sparsity, where it is not within 0.006 of what was asked.", "",
        *table(runs, RULES), "",
        "## A part by peaks", "",
        "Three windows, on which thresholds above a floor of 0.8 meet the sparsity; selectors "
        "fitted without a step of distillation.", "",
        *table(runs, [rule_of(*setting) for setting in PEAKS]),
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join([*lines, "", *where(runs)]))


def main() -> None:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--peaks", action="store_true", help="measure parts by peaks")
    parser.add_argument("--adapter", type=Path, default=CACHE / "fitted" / "adapter")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(CACHE / "smollm2", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CACHE / "smollm2")
    text = (CACHE / "texts" / "moby-dick.txt").read_text()[:BYTES]
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    adapter = SelectorAdapter.read(parsed.adapter)
    rules = dict.fromkeys(RULES, (4, 0.0))
    if parsed.peaks:
        rules = {rule_of(*setting): setting for setting in PEAKS}
    parsed.out.mkdir(parents=True, exist_ok=True)
    for length in parsed.lengths:
        settings = EvaluationSettings(
            lengths=(length,), windows=3 if parsed.peaks else 2, prefixes=0, repeats=0,
            kept_mass=False, baselines=(), block_size=32,
        )  # fmt: skip
        evaluation = Evaluation(model.to(parsed.device), {"moby-dick": tokens}, settings, adapter)
        for sparsity in SPARSITIES:
            for rule, setting in rules.items():
                key = {"length": length, "sparsity": sparsity, "rule": rule}
                if any(key.items() <= run.items() for run in load(parsed.out)):
                    continue
                evaluation.adapter = own = with_peaks(adapter, *setting)
                if parsed.peaks:
                    row = measure_peaks(evaluation, own, length, sparsity)
                else:
                    row = evaluation.measure("moby-dick", length, rule, sparsity)
                found = {"measured": row["measured_sparsity"], "ratio": row["ratio"]}
                found |= {"environment": environment(torch.device(parsed.device).type)}
                with (parsed.out / "runs.jsonl").open("a") as file:
                    file.write(json.dumps(key | found) + "\n")
                print(length, sparsity, rule, f"{row['ratio']:.4f}", flush=True)
        write_page(load(parsed.out), parsed.out)


if __name__ == "__main__":
    main()
