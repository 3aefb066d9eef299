"""What the commands for pretrained models give with nothing set, on a real model and real text.

Runs the commands of the README one after another, naming folders and the device alone.
``results/pretrained_defaults/`` holds what each printed (``distill.json``, ...) and ``README.md``.

    python experiments/fetch_smollm2.py                  # model and texts, once
    python experiments/pretrained_defaults.py --device cuda
    python experiments/pretrained_defaults.py --only distill evaluate
    python experiments/pretrained_defaults.py --only speed    # with distill's adapter, on a CPU

A stage whose file is there is not run again; one that was stopped goes on. The runs themselves lie
in ``.cache/pretrained_defaults``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fetch_smollm2 import CACHE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from provenance import environment, where

RESULTS = Path(__file__).parent / "results" / "pretrained_defaults"
RUNS = CACHE / "pretrained_defaults"
MODEL = CACHE / "smollm2"
TRAINED_ON = ("cfi-en", "debian-handbook", "jargon-text")
MEASURED_ON = "moby-dick"
STAGES = ("distill", "evaluate", "tune", "evaluate-tuned", "allot", "evaluate-allotted", "speed")
DISTILLED, TUNED = RUNS / "distill" / "adapter", RUNS / "tune"
ALLOTTED = RUNS / "allot" / "adapter"


def words(stage: str, model: Path, texts: Path) -> list[str]:
    """The stage as a user types it, without the device."""
    given = ["--model", str(model)]
    if stage == "evaluate-allotted":
        # Of one cell: what other shares of the layers change.
        cell = ["--lengths", "2048", "--sparsities", "0.9", "--prefixes", "0", "--repeats", "0"]
        text = str(texts / f"{MEASURED_ON}.txt")
        adapter = ["--adapter", str(ALLOTTED), "--text", text, "--baselines", "none"]
        return ["evaluate", *given, *adapter, *cell]
    if stage.startswith("evaluate"):
        adapter = ["--adapter", str(DISTILLED)]
        if stage == "evaluate-tuned":
            adapter = ["--adapter", str(TUNED / "adapter"), "--lora", str(TUNED / "lora")]
        return ["evaluate", *given, *adapter, "--text", str(texts / f"{MEASURED_ON}.txt")]
    if stage == "speed":
        return [*words("evaluate", model, texts), "--suite", "speed"]
    start = [] if stage == "distill" else ["--adapter", str(DISTILLED)]
    if (RUNS / stage / "checkpoints").is_dir():
        return [stage, "--resume", "--out", str(RUNS / stage)]
    trained = [str(texts / f"{name}.txt") for name in TRAINED_ON]
    return [stage, *given, *start, "--text", *trained, "--out", str(RUNS / stage)]


def run(stage: str, model: Path, texts: Path, device: str) -> dict[str, Any]:
    """What the stage prints as JSON, and how long it took."""
    command = [sys.executable, "-m", "dilated_attention_pytorch.cli.main"]
    command += words(stage, model, texts)
    if "--resume" not in command:
        command += ["--device", device]
    start = time.perf_counter()
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return {
        # Nobody needs to know where this machine keeps things.
        "found": json.loads(done.stdout.replace(str(CACHE), ".cache")),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "environment": environment(device.split(":")[0]),
    }


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished stages."""
    paths = {stage: folder / f"{stage}.json" for stage in STAGES}
    return {stage: json.loads(p.read_text()) for stage, p in paths.items() if p.is_file()}


def cells(found: Mapping[str, Any], method: str, which: str) -> list[str]:
    """Rows of the table: one per length and sparsity of a method."""
    rows = [r for r in found["rows"] if r["method"] == method]
    known = {"adapter:saved": "adapter as saved", "adapter": "adapter, calibrated here"}
    name = known.get(method, method) + (f", {which}" if which else "")
    out = []
    for row in sorted(rows, key=lambda r: (r["length"], r["sparsity"])):
        prefix = "-"
        if row.get("prefix_loss") is not None:
            prefix = f"{row['prefix_loss']:.3f} / {row['teacher_forced_loss']:.3f}"
        out.append(
            f"| {name} | {row['length']:,} | {row['sparsity']:g} | {row['measured_sparsity']:.3f} |"
            f" {row['ratio']:.3f} | {row['kept_mass']:.3f} | {prefix} |"
        )
    return out


def speeds(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of ``evaluate --suite speed``."""
    if "speed" not in stages:
        return []
    lines = [
        "", f"`evaluate --suite speed` on {stages['speed']['environment']['device']}, seconds of a "
        "prompt and of a new token behind it:", "",
        "| tokens | prompt, sparse | dense | dense / sparse | token, sparse | dense |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in stages["speed"]["found"]["rows"]:
        prompt, token = (
            [row[f"{part}_{how}"] for how in ("sparse", "dense")]
            for part in ("prefill", "generation")
        )
        lines.append(
            f"| {row['length']:,} | {prompt[0]:.2f} | {prompt[1]:.2f} | {prompt[1] / prompt[0]:.2f}"
            f" | {token[0]:.3f} | {token[1]:.3f} |"
        )
    return lines


def write_page(stages: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Writes the table."""
    lines = [
        "# What the commands for pretrained models give with nothing set", "",
        f"SmolLM2-135M-Instruct; trained on {', '.join(TRAINED_ON)}, measured on {MEASURED_ON}. "
        "Perplexity is relative to dense attention of the model as it came. *As saved*: with the "
        "thresholds of the text that it was trained on. The last column: loss "
        "predicted from the prefix alone / in a pass over the whole window, at the same places.",
        "",
        "| choice | tokens | asked | measured | perplexity / dense | kept mass | prefix / window |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for stage in ("evaluate", "evaluate-tuned", "evaluate-allotted"):
        if stage not in stages:
            continue
        found = stages[stage]["found"]
        for method in dict.fromkeys(row["method"] for row in found["rows"]):
            if stage == "evaluate" or method.startswith("adapter"):
                lines += cells(found, method, stage.partition("-")[2])
    lines += speeds(stages)
    lines += ["", "| command | seconds in all |", "|---|---|"]
    lines += [f"| `{name}` | {stage['wall_seconds']:.0f} |" for name, stage in stages.items()]
    lines += ["", *where(list(stages.values()))]
    (folder / "README.md").write_text("\n".join(lines))


def main(given: Sequence[str] | None = None) -> int:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--texts", type=Path, default=CACHE / "texts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(given)
    if not (parsed.model / "config.json").is_file():
        sys.exit(f"No model in {parsed.model}: run experiments/fetch_smollm2.py first.")
    parsed.out.mkdir(parents=True, exist_ok=True)
    for stage in parsed.only:
        if stage in load(parsed.out):
            continue
        found = run(stage, parsed.model, parsed.texts, parsed.device)
        (parsed.out / f"{stage}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{stage}: {found['wall_seconds']:.0f} s", flush=True)
    write_page(load(parsed.out), parsed.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
