"""Which block summary lets a scorer find the right block when queries and keys are frozen?

A one-layer dense model is trained on the needle task and frozen, as a pretrained model would be.
Then only a selector is taught, by cross entropy on the block that holds the answer, with different
summaries. Reported: the share of queries whose block is among the top 2 scored ones. Writes
``results/frozen_summaries/{runs.jsonl,table.md}``; finished runs are skipped.

    python experiments/frozen_summaries.py
    python experiments/frozen_summaries.py --quick     # seconds; nothing kept
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import ImportanceScorer, block_summaries, parameter_groups
from dilated_attention_pytorch.tasks.needle import (
    NeedleBatch,
    NeedleModel,
    NeedleRun,
    build_needle_model,
    needle_config,
    train_needle,
)
from needle import environment, load_runs, where

RESULTS = Path(__file__).parent / "results" / "frozen_summaries"
SUMMARIES = (
    ("mean",),
    ("max",),
    ("mean", "max"),
    ("mean", "max", "min"),
    ("attention",),
    ("mean", "attention"),
    ("mean", "max", "attention"),
)
TOP = 2


@torch.no_grad()
def frozen_heads(model: NeedleModel, batch: NeedleBatch) -> tuple[Tensor, Tensor]:
    """Queries and keys of the first layer, ``(batch, n, heads, head_dim)``."""
    block: Any = model.transformer.blocks[0]
    x = model.embed(batch)
    qkv = block.qkv(block.attention_norm(x)).view(*x.shape[:2], 3, block.num_heads, -1)
    return qkv[:, :, 0], qkv[:, :, 1]


class Selector(torch.nn.Module):
    """A scorer on summaries, with pool queries where the summary needs them."""

    def __init__(self, heads: int, head_dim: int, pooling: tuple[str, ...], block: int) -> None:
        super().__init__()
        self.pooling, self.block = pooling, block
        self.scorer = ImportanceScorer(head_dim * len(pooling), heads, hidden_dim=32)
        shape, std = (heads, head_dim), head_dim**-0.5
        self.query_pool = torch.nn.Parameter(torch.randn(shape) * std)
        self.key_pool = torch.nn.Parameter(torch.randn(shape) * std)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores ``(batch, i, j)``, averaged over heads; blocks from the own one on are -inf."""
        pooled = [
            block_summaries(x, self.block, pooling=self.pooling, pool_query=pool)
            for x, pool in ((query, self.query_pool), (key, self.key_pool))
        ]
        scores = self.scorer(*pooled).mean(1)
        later = torch.ones_like(scores[0], dtype=torch.bool).triu()
        return scores.masked_fill(later, -torch.inf)


def teach(model: NeedleModel, run: NeedleRun, pooling: tuple[str, ...], steps: int) -> float:
    """Teaches a selector and returns the share of blocks found."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(1000 + run.seed)
    heads, device = 2, torch.device(run.device)
    selector = Selector(heads, 64 // heads, pooling, run.task.block_size).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(selector), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = run.task.batch(16, generator).to(device)
        scores = selector(*frozen_heads(model, batch))
        # Row 1 has one candidate only; there is nothing to learn from it.
        loss = F.cross_entropy(scores[:, 2:].flatten(0, 1), batch.target[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    held_out = torch.Generator().manual_seed(123)
    found = total = 0
    with torch.no_grad():
        for _ in range(8):
            batch = run.task.batch(32, held_out).to(device)
            scores = selector(*frozen_heads(model, batch))[:, TOP + 1 :]
            best = scores.topk(TOP, -1).indices
            hit = (best == batch.target[:, TOP + 1 :, None]).any(-1)
            found, total = found + int(hit.sum()), total + hit.numel()
    return found / total


def write_table(runs: list[dict[str, Any]], path: Path) -> None:
    """Writes the shares by summary and number of steps."""
    cells: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for run in runs:
        cells[run["pooling"], run["steps"]][run["seed"]] = run["found"]
    budgets = sorted({run["steps"] for run in runs})
    lines = ["| summary | " + " | ".join(f"{steps} steps" for steps in budgets) + " |"]
    lines.append("|---|" + "---|" * len(budgets))
    for pooling in ("+".join(names) for names in SUMMARIES):
        row = []
        for steps in budgets:
            found = cells.get((pooling, steps), {})
            row.append(" ".join(f"{found[seed]:.3f}" for seed in sorted(found)) or "-")
        lines.append(f"| {pooling} | " + " | ".join(row) + " |")
    lines += [
        "",
        f"Share of queries (from block {TOP + 1} on) whose block is in the top {TOP}; one number "
        "per seed; bilinear scorer of rank 32 on frozen queries and keys.",
        "",
        *where(runs),
    ]
    path.write_text("\n".join(lines))


def main() -> int:
    """Runs what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[500, 1500])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    out, dense_steps = arguments.out, 1500
    if arguments.quick:
        out, dense_steps = Path(tempfile.mkdtemp(prefix="frozen-")), 20
        arguments.seeds, arguments.steps = [0], [10]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "runs.jsonl"
    done = {(r["pooling"], r["seed"], r["steps"]) for r in load_runs(log)}
    for seed in arguments.seeds:
        cells = [
            (names, steps)
            for names in SUMMARIES
            for steps in arguments.steps
            if ("+".join(names), seed, steps) not in done
        ]
        if not cells:
            continue
        run = NeedleRun(
            "dense", needle_config(), steps=dense_steps, seed=seed, device=arguments.device
        )
        model = build_needle_model(run)
        accuracy = [p.accuracy for p in train_needle(run, model)][-1]
        model.requires_grad_(False)
        for names, steps in cells:
            found = teach(model, run, names, steps)
            result = {
                "pooling": "+".join(names),
                "seed": seed,
                "steps": steps,
                "found": found,
                "dense_accuracy": accuracy,
                "environment": environment(arguments.device),
            }
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"seed {seed} {'+'.join(names)}, {steps} steps: {found:.3f}", flush=True)
    write_table(load_runs(log), out / "table.md")
    print(f"wrote {out}/table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
