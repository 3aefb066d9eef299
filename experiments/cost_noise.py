"""How far shares of a budget follow the noise of the costs that they come from.

What sparsity costs in every layer of SmolLM2-135M was measured twice, on different held-out windows
(``results/pretrained/costs.jsonl``). Shares by the one measurement are priced by the other: those
that are best by the costs as measured, those of ``SparsityCosts.allot``, which minds their noise,
and equal ones. Seconds on a CPU; writes ``results/pretrained/cost_noise.json``::

    python experiments/cost_noise.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from dilated_attention_pytorch.selection.layer_shares import SparsityCosts

FOLDER = Path(__file__).parent / "results" / "pretrained"
# Both at 8,192 tokens and blocks of 64.
COMMITS = ("ae42e13", "0e255fc")
RULES: dict[str, Callable[[SparsityCosts, float], dict[int, float]]] = {
    "best as measured": SparsityCosts.cheapest,
    "allot": SparsityCosts.allot,
    "equal": lambda costs, sparsity: dict.fromkeys(costs.costs, sparsity),
}


def measured(commit: str) -> SparsityCosts:
    """The costs of one measurement."""
    rows = [json.loads(line) for line in (FOLDER / "costs.jsonl").read_text().splitlines()]
    chosen = [
        row for row in rows
        if (row["commit"], row["length"], row["block_size"]) == (commit, 8192, 64)
    ]  # fmt: skip
    costs: dict[int, tuple[float, ...]] = {row["layer"]: tuple(row["costs"]) for row in chosen}
    return SparsityCosts(8192, tuple(chosen[0]["sparsities"]), costs)


def compared(first: SparsityCosts, second: SparsityCosts) -> list[dict[str, Any]]:
    """By sparsity and rule: the price of the shares by the other costs, and how they differ."""
    out: list[dict[str, Any]] = []
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        for name, rule in RULES.items():
            one, other = rule(first, sparsity), rule(second, sparsity)
            out.append(
                {
                    "sparsity": sparsity, "rule": name,
                    "price_by_the_other": [second.price(one), first.price(other)],
                    "difference": mean(abs(one[layer] - other[layer]) for layer in one),
                }
            )  # fmt: skip
    return out


def main() -> int:
    """Prints and writes the comparison."""
    first, second = (measured(commit) for commit in COMMITS)
    rows = compared(first, second)
    for row in rows:
        prices = " ".join(f"{price:.4f}" for price in row["price_by_the_other"])
        print(f"{row['sparsity']} {row['rule']}: {prices} nats, {row['difference']:.3f} apart")
    content = {"commits": COMMITS, "noise": [first.noise, second.noise], "rows": rows}
    (FOLDER / "cost_noise.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
