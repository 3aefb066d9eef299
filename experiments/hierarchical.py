"""Does choosing in levels find what scoring every block finds, at a quarter of the pairs?

The needle task with 512 blocks (8,192 tokens, 1,024 keys, one layer, 2 scored blocks per row).
Every model trains on 32, then 128, then 512 blocks. Compared: scoring all blocks, and hierarchies
whose rows score at most a quarter of the pairs. Measured on held-out sequences of 512 blocks:
accuracy, recall of the block with the answer, and recall of the full top-k: of the blocks that the
same model picks when every super-block is kept, the share that it picks.

    python experiments/hierarchical.py --device cuda --jobs 12
    python experiments/hierarchical.py --quick            # a few steps on the CPU, nothing kept

Writes ``results/hierarchical/runs.jsonl`` and ``table.md``; finished runs are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch import AdaptiveConfig, AdaptiveSparsityTrainer, parameter_groups
from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.models import build_attention, scorer_parameters
from dilated_attention_pytorch.tasks.needle import NeedleModel, NeedleTask

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from provenance import environment

RESULTS = Path(__file__).parent / "results" / "hierarchical"
TASK = NeedleTask(seq_len=8192, num_keys=1024)
ALL_KEPT = 10**6


@dataclass(frozen=True)
class Phase:
    """Some steps at one length."""

    seq_len: int
    batch_size: int
    steps: int


PHASES = (Phase(512, 64, 1500), Phase(2048, 16, 800), Phase(8192, 8, 800))
QUICK = (Phase(512, 4, 3), Phase(2048, 1, 2))


@dataclass(frozen=True)
class Variant:
    """One row of the table: a hierarchy and the super-blocks it keeps."""

    hierarchy: tuple[int, ...] = ()
    keep: int = 8

    @property
    def name(self) -> str:
        """Its key in the results."""
        if not self.hierarchy:
            return "all blocks"
        return f"{'x'.join(map(str, self.hierarchy))}, {self.keep} kept"

    def config(self) -> AdaptiveConfig:
        """The layer's settings."""
        return AdaptiveConfig(
            block_size=TASK.block_size, budget="fixed", num_selected_blocks=2, hidden_dim=64,
            num_explore_blocks=4, hierarchy=self.hierarchy, hierarchy_keep=self.keep,
        )  # fmt: skip


VARIANTS = (Variant(), Variant((8,), 7), Variant((16,), 5), Variant((4, 4), 9))


def pairs_per_row(num_key_blocks: int, hierarchy: Sequence[int], kept: int, forced: int = 1) -> int:
    """Pairs that one row scores at most, of all levels together.

    Args:
        num_key_blocks: Key blocks, j.
        hierarchy: Children per super-block, from the finest level up.
        kept: Super-blocks kept by score on every level.
        forced: Super-blocks that are kept in any case.
    """
    counts = [num_key_blocks]
    for size in hierarchy:
        counts.append(ceil_div(counts[-1], size))
    total = counts[-1]
    for level, size in reversed(list(enumerate(hierarchy))):
        total += min((kept + forced) * size, counts[level])
    return total


def build(config: AdaptiveConfig, seed: int, device: str) -> NeedleModel:
    """The untrained model."""
    torch.manual_seed(seed)
    model = NeedleModel(
        TASK, lambda heads, dim: build_attention("adaptive", heads, dim, config), dim=128
    )
    return model.to(device)


def train(
    model: NeedleModel, variant: Variant, phases: tuple[Phase, ...], seed: int, device: str
) -> Iterator[tuple[int, float]]:
    """Trains, and yields step and loss every 100 steps."""
    generator = torch.Generator().manual_seed(seed)
    selectors = scorer_parameters(model)
    own = {id(p) for p in selectors}
    rest = [p for p in model.parameters() if id(p) not in own]
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.98))
    total = sum(phase.steps for phase in phases)
    trainer = AdaptiveSparsityTrainer(
        model, initial_temperature=1.0, final_temperature=variant.config().min_temperature,
        annealing_steps=max(total // 2, 1),
    )  # fmt: skip
    model.train()
    step = 0
    for phase in phases:
        task = replace(TASK, seq_len=phase.seq_len)
        for _ in range(phase.steps):
            rate = min(1.0, (step + 1) / 50)
            rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * rate
            logits, answers = model(
                task.batch(phase.batch_size, generator).to(torch.device(device))
            )
            loss = F.cross_entropy(logits.float(), answers)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(rest, 1.0)
            nn.utils.clip_grad_norm_(selectors, 1.0)
            optimizer.step()
            trainer.step()
            step += 1
            if step % 100 == 0 or step == total:
                yield step, float(loss.detach())


def chosen(model: NeedleModel, batch: Any) -> Tensor:
    """The kept blocks ``(batch, heads, i, j)``."""
    (info,) = model.transformer.patterns(model.embed(batch))
    kept: Tensor = info["pattern"].to_dense()
    return kept.expand(len(batch.target), -1, -1, -1)


@torch.no_grad()
def evaluate(
    model: NeedleModel, full: NeedleModel, device: str, seq_len: int, batches: int, size: int = 8
) -> dict[str, float]:
    """Accuracy and recalls on held-out sequences; ``full`` keeps every super-block."""
    model.eval()
    full.eval()
    task = replace(TASK, seq_len=seq_len)
    generator = torch.Generator().manual_seed(123)
    right = asked = found = of_full = common = targets = 0
    for _ in range(batches):
        batch = task.batch(size, generator).to(torch.device(device))
        logits, answers = model(batch)
        right += int((logits.argmax(-1) == answers).sum())
        asked += answers.numel()
        kept, wanted = chosen(model, batch), chosen(full, batch)
        heads = kept.shape[1]
        index = batch.target[:, None, 1:, None].expand(-1, heads, -1, -1)
        found += int(kept[:, :, 1:].gather(-1, index).sum())
        targets += index.numel()
        # The diagonal block is forced and says nothing.
        off = ~torch.eye(kept.shape[-1], dtype=torch.bool, device=kept.device)
        common += int((kept & wanted & off).sum())
        of_full += int((wanted & off).sum())
    return {
        "accuracy": right / asked,
        "recall": found / targets,
        "recall of the full top-k": common / max(of_full, 1),
    }


def execute(
    variant: Variant, seed: int, phases: tuple[Phase, ...], device: str, batches: int
) -> dict[str, Any]:
    """Trains and evaluates one run, in a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = build(variant.config(), seed, device)
    curve = list(train(model, variant, phases, seed, device))
    full = build(replace(variant.config(), hierarchy_keep=ALL_KEPT), seed, device)
    full.load_state_dict(model.state_dict())
    blocks = phases[-1].seq_len // TASK.block_size
    pairs = pairs_per_row(blocks, variant.hierarchy, variant.keep if variant.hierarchy else 0)
    return {
        "variant": variant.name,
        "seed": seed,
        "blocks": blocks,
        "pairs_per_row": pairs,
        "share_of_pairs": pairs / blocks,
        **evaluate(model, full, device, phases[-1].seq_len, batches),
        "phases": [asdict(phase) for phase in phases],
        "curve": curve,
        "seconds": time.perf_counter() - start,
        "config": variant.config().to_dict(),
        "environment": environment(device),
    }


def write_table(runs: list[dict[str, Any]], path: Path) -> None:
    """Writes one row per variant."""
    head = ("choice", "pairs scored per row", "accuracy", "recall of the answer's block",
            "recall of the full top-k")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant in VARIANTS:
        rows = sorted((r for r in runs if r["variant"] == variant.name), key=lambda r: r["seed"])
        if not rows:
            continue
        cells = [variant.name, f"{rows[0]['pairs_per_row']} ({rows[0]['share_of_pairs']:.2f})"]
        cells += [
            " ".join(f"{r[key]:.3f}" for r in rows)
            for key in ("accuracy", "recall", "recall of the full top-k")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    about = runs[0]["environment"]
    note = (
        f"{runs[0]['blocks']} blocks, 2 scored blocks per row, seeds from 0 on; "
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}."
    )
    lines += ["", note, ""]
    path.write_text("\n".join(lines))


def main() -> int:
    """Runs what is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    out, batches = arguments.out, 8
    phases = tuple(replace(x, steps=max(round(x.steps * arguments.scale), 1)) for x in PHASES)
    if arguments.quick:
        out, phases, batches = Path(tempfile.mkdtemp(prefix="hierarchical-")), QUICK, 1
        arguments.seeds = [0]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "runs.jsonl"
    done = log.read_text().splitlines() if log.exists() else []
    names = {(r["variant"], r["seed"]) for r in map(json.loads, done)}
    cells = [(v, s) for s in arguments.seeds for v in VARIANTS if (v.name, s) not in names]
    # CUDA does not survive a fork.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(execute, *c, phases, arguments.device, batches) for c in cells]
        for future in as_completed(futures):
            result = future.result()
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
            shown = {k: result[k] for k in ("variant", "seed", "accuracy", "recall",
                                            "recall of the full top-k", "seconds")}  # fmt: skip
            print(json.dumps(shown), flush=True)
    write_table([json.loads(line) for line in log.read_text().splitlines()], out / "table.md")
    print((out / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
