"""20,000 training steps with random lengths, paddings and packings: does anything break or leak?

A small causal model in bfloat16 (autocast) continues sequences that repeat themselves. Every step
draws batch size, length and one of: no padding, key lengths, packed documents. Watched: losses and
parameters stay finite, memory stays flat, and the number of compiled kernel variants stops growing.

    python experiments/soak.py --device cuda              # 20,000 steps
    python experiments/soak.py --steps 60                 # a few on the CPU

Writes ``results/soak/result.json``; ``results/soak/state.pt`` lets an interrupted run go on where
it stopped and is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch import (
    AdaptiveConfig,
    AdaptiveSparsityTrainer,
    BlockSparseAdaptive,
    parameter_groups,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from provenance import environment

RESULTS = Path(__file__).parent / "results" / "soak"
LONGEST, VOCABULARY = 512, 64
MODES = ("plain", "padded", "packed")


class Model(nn.Module):
    """One attention layer between an embedding and a head."""

    def __init__(self, dim: int = 64, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Embedding(LONGEST, dim)
        self.qkv = nn.Linear(dim, dim + 2 * dim * kv_heads // heads)
        config = AdaptiveConfig(block_size=16, base_sparsity=0.6, pooling=("mean", "max"))
        self.attention = BlockSparseAdaptive(
            num_heads=heads, head_dim=dim // heads, num_kv_heads=kv_heads, adaptive_config=config
        )
        self.out = nn.Linear(dim, dim)
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits ``(batch, n, vocabulary)``."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 2)
        x = x + self.out(self.attention(q, k, v, is_causal=True, **options).flatten(2))
        return self.head(self.norm(x))


def draw(chance: random.Random, device: str) -> tuple[str, Tensor, Tensor, dict[str, Tensor]]:
    """Mode, tokens, which of them count, and the layer's arguments."""
    mode = chance.choice(MODES)
    batch, length = chance.randint(1, 4), chance.randint(2, LONGEST)
    seed = torch.Generator().manual_seed(chance.getrandbits(31))
    period = chance.randint(2, 24)
    motif = torch.randint(0, VOCABULARY, (batch, period), generator=seed)
    tokens = motif.repeat(1, length // period + 1)[:, :length]
    counts = torch.ones(batch, length, dtype=torch.bool)
    options = {}
    if mode == "padded":
        lengths = torch.tensor([chance.randint(1, length) for _ in range(batch)])
        counts = torch.arange(length) < lengths[:, None]
        options["key_lengths"] = lengths.to(device)
    if mode == "packed":
        documents = chance.randint(1, 5)
        cuts = [
            [0, *sorted(chance.randint(0, length) for _ in range(documents))] for _ in range(batch)
        ]
        counts = torch.arange(length) < torch.tensor([row[-1] for row in cuts])[:, None]
        options["cu_seqlens"] = torch.tensor(cuts).to(device)
    return mode, tokens.to(device), counts.to(device), options


def kernel_variants() -> int:
    """How many kernels have been compiled for this process's devices."""
    if not torch.cuda.is_available():
        return 0
    from dilated_attention_pytorch.ops.block_selection import (
        budgets,
        choice,
        lattice,
        low_rank,
        scores,
        summaries,
        threshold,
        transpose,
    )
    from dilated_attention_pytorch.ops.block_sparse_attention import (
        triton_backward,
        triton_by_products,
        triton_forward,
    )

    total = 0
    for module in (
        budgets, choice, lattice, low_rank, scores, summaries, threshold, transpose,
        triton_forward, triton_backward, triton_by_products,
    ):  # fmt: skip
        for function in vars(module).values():
            caches = getattr(function, "device_caches", {})
            total += sum(len(cache[0]) for cache in caches.values())
    return total


def observe(step: int, losses: list[float], device: str) -> dict[str, Any]:
    """One line of the record."""
    found = {
        "step": step,
        "loss": statistics.mean(losses) if losses else None,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "kernel_variants": kernel_variants(),
    }
    if device == "cuda":
        found["allocated_mib"] = torch.cuda.memory_allocated() / 2**20
        found["reserved_mib"] = torch.cuda.memory_reserved() / 2**20
    return found


def conclude(lines: list[dict[str, Any]], bad_steps: int) -> dict[str, Any]:
    """What the run shows: growth from the first fifth of the run to its end."""
    settled, last = lines[len(lines) // 5], lines[-1]
    found: dict[str, Any] = {
        "steps": last["step"],
        "steps_with_nan_or_inf": bad_steps,
        "loss_first": lines[0]["loss"],
        "loss_last": last["loss"],
    }
    for name in ("rss_mib", "allocated_mib", "reserved_mib", "kernel_variants"):
        if name in last:
            found[f"{name}, after a fifth"] = settled[name]
            found[f"{name}, at the end"] = last[name]
    return found


def main() -> int:
    """Trains, watches and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device, every = arguments.device, min(arguments.every, max(arguments.steps // 5, 1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    saved = arguments.out / "state.pt"
    torch.manual_seed(0)
    chance = random.Random(0)
    model = Model().to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, fused=device == "cuda")
    trainer = AdaptiveSparsityTrainer(model, annealing_steps=arguments.steps)
    lines: list[dict[str, Any]] = []
    modes: Counter[str] = Counter()
    first, bad_steps, before = 0, 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        trainer.load_state_dict(state["trainer"])
        chance.setstate(state["chance"])
        lines, modes, bad_steps = state["lines"], state["modes"], state["bad_steps"]
        first, before = state["step"], state["seconds"]
        print(f"goes on after step {first}", flush=True)
    start = time.perf_counter()
    # On the device: looking at every loss would wait for it.
    bad = torch.zeros((), dtype=torch.int64, device=device)
    losses: list[Tensor] = []
    for step in range(first + 1, arguments.steps + 1):
        mode, tokens, counts, options = draw(chance, device)
        modes[mode] += 1
        with torch.autocast(device, torch.bfloat16):
            logits = model(tokens, **options)
        target = tokens[:, 1:].masked_fill(~counts[:, 1:], -100)
        summed = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), target.flatten(), reduction="sum"
        )
        loss = summed / (target != -100).sum().clamp(min=1)
        loss = loss + 0.01 * model.attention.get_sparsity_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        trainer.step()
        bad += ~(loss.detach().isfinite() & norm.isfinite())
        losses.append(loss.detach())
        if step % every == 0 or step == arguments.steps:
            lines.append(observe(step, torch.stack(losses).tolist(), device))
            losses.clear()
            seconds = before + time.perf_counter() - start
            rate = (step - first) / (seconds - before)
            print(f"{json.dumps(lines[-1])} {rate:.0f} steps/s", flush=True)
            torch.save(
                {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "trainer": trainer.state_dict(), "chance": chance.getstate(), "lines": lines,
                    "modes": modes, "bad_steps": bad_steps + int(bad), "step": step,
                    "seconds": seconds,
                },
                saved,
            )  # fmt: skip
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    record = {
        "environment": environment(device),
        "conclusions": conclude(lines, bad_steps + int(bad)) | {"parameters_finite": finite},
        "modes": dict(modes),
        "seconds": before + time.perf_counter() - start,
        "lines": lines,
    }
    (arguments.out / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    saved.unlink(missing_ok=True)
    print(json.dumps(record["conclusions"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
