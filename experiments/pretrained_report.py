"""The report of ``pretrained.py``: merges what was measured into the committed results."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.selection.budget import most_sparse
from pretrained_texts import MEASURED_ON, RUNS

RESULTS = Path(__file__).parent / "results" / "pretrained"
# The oracle of the same budget as the selectors'; with a floor it has the same name.
ORACLES = {"adapter": "oracle:threshold", "adapter:fixed": "oracle"}


def report() -> None:
    """Gathers results, adapters and the plot where they are committed, and prints the bars.

    What was measured anew replaces the committed row of the same cell, and nothing else. Rows at
    sparsities that leave nothing to choose say nothing and are left out.
    """
    from dilated_attention_pytorch.analysis.plots import plot_perplexity

    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "results.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    # Runs with a suffix are attempts of their own and stay apart.
    files = sorted(p for p in RUNS.glob("*.jsonl") if re.fullmatch(r"evaluate-\d+", p.stem))
    rows = merged(
        before.get("rows", []), [row for file in files for row in read_lines(file)],
        ("text", "length", "block_size", "method", "sparsity"),
    )  # fmt: skip
    rows = [r for r in rows if r["sparsity"] <= most_sparse(r["length"], r["block_size"], 1, 0)]
    tuned = merged(
        before.get("tuned", []), read_lines(RUNS / "evaluate-tuned.jsonl"),
        ("run", "text", "length"),
    )  # fmt: skip
    runs = dict(before.get("runs", {}))
    for done in sorted(RUNS.glob("*/done.json")):
        runs[done.parent.name] = portable(json.loads(done.read_text()))
    content: dict[str, Any] = {
        "about": {"measured_on": MEASURED_ON}, "runs": runs, "rows": rows, "tuned": tuned,
        "bars": bars(rows), "tuned_ratios": tuned_ratios(tuned, runs),
    }  # fmt: skip
    content["ahead"] = ahead(content["bars"])
    path.write_text(json.dumps(content, indent=1) + "\n")
    if rows:
        plot_perplexity(rows).savefig(RESULTS / "perplexity.png", dpi=90)
    for size, suffix in ((64, ""), (32, "-32")):
        folder = RUNS / f"distill-{size}"
        if (folder / "adapter").is_dir():
            target = RESULTS / f"adapter{suffix}"
            card = shutil.ignore_patterns("README.md")
            shutil.copytree(folder / "adapter", target, dirs_exist_ok=True, ignore=card)
            about = target / "adapter.json"
            clean = portable(json.loads(about.read_text()))
            about.write_text(json.dumps(clean, indent=2) + "\n")
        if (folder / "metrics.jsonl").is_file():
            shutil.copy(folder / "metrics.jsonl", RESULTS / f"distill{suffix}.jsonl")
    for line in (*content["bars"], *content["tuned_ratios"], content["ahead"]):
        print(line)


def merged(
    before: list[dict[str, Any]], found: list[dict[str, Any]], key: tuple[str, ...]
) -> list[dict[str, Any]]:
    """All rows, of each cell the latest, in the order in which cells were first measured."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (*before, *found):
        out[tuple(row[name] for name in key)] = row
    return list(out.values())


def portable(value: Any) -> Any:
    """The same with paths from the cache's folder on."""
    if isinstance(value, dict):
        return {name: portable(x) for name, x in value.items()}
    if isinstance(value, list):
        return [portable(x) for x in value]
    if isinstance(value, str) and value.startswith("/") and ".cache" in Path(value).parts:
        parts = Path(value).parts
        return "/".join(parts[parts.index(".cache") :])
    return value


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
        # With our shares of the layers a baseline is no longer free of training.
        baselines = {
            m: x
            for m, x in ratio.items()
            if not m.startswith(("adapter", "oracle")) and not m.endswith(":allotted")
        }
        mine = [method for method in ratio if method.startswith("adapter")]
        if not mine or not baselines:
            continue
        best = min(baselines, key=baselines.__getitem__)
        entry = dict(zip(("text", "length", "block_size", "sparsity"), key, strict=True))
        entry |= {"best_rival": best, "rival": baselines[best]}
        for own in mine:
            entry[own] = ratio[own]
            oracle = ORACLES.get(own, own.replace("adapter", "oracle"))
            if oracle in ratio and baselines[best] > ratio[oracle]:
                gap = baselines[best] - ratio[oracle]
                entry[f"{own}_closed"] = (baselines[best] - ratio[own]) / gap
        shared = ratio.get("oracle:allotted", baselines[best])
        if "adapter" in mine and shared < baselines[best]:
            # The oracle that is given the adapter's shares of the layers, too.
            entry["adapter_closed_allotted"] = (baselines[best] - ratio["adapter"]) / (
                baselines[best] - shared
            )
        out.append(entry)
    return out


def ahead(found: list[dict[str, Any]]) -> dict[str, int]:
    """In how many cells with ``adapter`` it is ahead of every training-free baseline.

    ``with_best_budget`` takes the best of ``adapter`` and its other budgets.
    """
    cells = [bar for bar in found if "adapter" in bar]
    own = ("adapter", "adapter:threshold", "adapter:fixed")
    best = [min(bar[name] for name in own if name in bar) for bar in cells]
    return {
        "cells": len(cells),
        "adapter": sum(bar["adapter"] < bar["rival"] for bar in cells),
        "with_best_budget": sum(x < bar["rival"] for x, bar in zip(best, cells, strict=True)),
    }


def tuned_ratios(tuned: list[dict[str, Any]], runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Perplexity of sparse tuned models over that of the one tuned dense in the same way.

    The same way: what is trained, tokens and learning rate. Rows without such a partner are left
    out.
    """

    def kind(name: str) -> tuple[Any, ...]:
        about = runs[name]
        run = about["job"]["run"]
        steps = about.get("stopped_at_step", run["steps"])
        rest = ("train", "seq_len", "batch_size", "base_learning_rate", "seed")
        return steps, tuple(about.get("trained_on", ())), *(run[field] for field in rest)

    known = [row for row in tuned if row["run"] in runs]
    dense = {
        (kind(row["run"]), row["text"], row["length"]): row["perplexity"]
        for row in known
        if runs[row["run"]]["job"]["run"]["attention"] == "dense"
    }
    out = []
    for row in known:
        run = runs[row["run"]]["job"]["run"]
        partner = (kind(row["run"]), row["text"], row["length"])
        if run["attention"] == "sparse" and partner in dense:
            out.append(
                {"run": row["run"], "text": row["text"], "length": row["length"],
                 "sparsity": run["base_sparsity"], "measured_sparsity": row["measured_sparsity"],
                 "ratio": row["perplexity"] / dense[partner]}
            )  # fmt: skip
    return out


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of lines; none if there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
