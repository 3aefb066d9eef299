"""Time per generated token over a KV cache: block-sparse decoding against dense attention.

    python benchmarks/decode.py          # one GPU, bfloat16, CUDA graphs for everybody
    python benchmarks/decode.py --cpu    # 2 threads, float32
    python benchmarks/decode.py --tune   # one GPU: launches of the split kernel

One layer with 32 query heads and 8 KV heads of 128. Ours is ``BlockSparseAdaptive.decode`` as a
whole: summaries, choice and attention, for a block of 64 tokens of which the first chooses
(``query_scope="past"``); "each token" chooses anew for every token, "compiled" by fused kernels. As
many copies of the cache take turns as exceed the GPU's L2 cache, as the layers of a model do.
Medians of contenders that take turns in one run. Writes ``results/decode_gpu.json`` or
``results/decode_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.nn.state import SelectorState

sys.path.insert(0, str(Path(__file__).parent))
from gpu_setups import Recorded
from provenance import environment

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 64
# Several times the L2 cache of an H100 or H200 (50 MiB).
COLD_BYTES = 256 * 2**20
# Setups of the contenders that take long to compile.
COMPILED = [(131072, 1), (32768, 8)]


@dataclass(frozen=True)
class Setup:
    """Cached tokens of each sample, and samples."""

    tokens: int
    batch: int

    def __str__(self) -> str:
        return f"{self.tokens // 1024:4}K x {self.batch}"


class Caches:
    """Keys and values of some layers, ``(batch, heads, tokens, dim)`` in memory, and queries."""

    def __init__(self, setup: Setup, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        shape = (setup.batch, KV_HEADS, setup.tokens, DIM)
        one = 2 * setup.batch * KV_HEADS * setup.tokens * DIM * dtype.itemsize
        count = -(-COLD_BYTES // one) if device == "cuda" else 1
        self.layers = [(randn(*shape), randn(*shape)) for _ in range(count)]
        self.query = randn(setup.batch, BLOCK, HEADS, DIM)


Run = Callable[[], None]


def make_layer(sparsity: float, scope: str, shared: bool) -> BlockSparseAdaptive:
    """A layer with random weights: what it chooses costs the same."""
    torch.manual_seed(0)
    config = AdaptiveConfig(
        base_sparsity=sparsity, budget="fixed", query_scope=scope, block_size=BLOCK,
        share_within_kv_group=shared,
    )  # fmt: skip
    layer = BlockSparseAdaptive(None, None, HEADS, DIM, config, num_kv_heads=KV_HEADS)
    return layer.eval()


def ours(
    caches: Caches,
    setup: Setup,
    sparsity: float,
    scope: str = "past",
    shared: bool = True,
    compiled: bool = False,
) -> tuple[Run, int, float]:
    """Decodes the last tokens of the caches; the tokens done, and the share of blocks read."""
    key = caches.layers[0][0]
    layer = make_layer(sparsity, scope, shared).to(key.device, key.dtype)
    prompt, steps = setup.tokens - BLOCK, BLOCK if scope == "past" else 4
    states = []
    for k, _ in caches.layers:
        state = SelectorState(setup.tokens, compile=compiled)
        recent = torch.zeros(1, 1, 1, 1, device=k.device, dtype=k.dtype)
        # Queries matter from the last block on; a whole prompt of them would fill the memory.
        queries = recent.expand(setup.batch, prompt, HEADS, DIM)
        layer.remember(queries, k[:, :, :prompt].transpose(1, 2), state)
        states.append(state)

    def run() -> None:
        for state in states:
            state.lengths.fill_(prompt)
            state.num_tokens = prompt
        for step in range(steps):
            for (k, v), state in zip(caches.layers, states, strict=True):
                layer.decode(
                    caches.query[:, step : step + 1], k.transpose(1, 2), v.transpose(1, 2), state,
                    choose=step == 0 or scope == "block",
                )  # fmt: skip

    run()
    memory = states[0].filled()
    read = float(memory.counts.float().mean()) / (setup.tokens // BLOCK)
    return run, steps * len(states), read


def dense(caches: Caches, backend: SDPBackend, packed: bool) -> tuple[Run, int]:
    """SDPA; packed: the query heads of a group as rows of one KV head."""
    query = caches.query[:, 0].unflatten(1, (KV_HEADS, -1))
    query = query if packed else query.flatten(1, 2)[:, :, None]

    def run() -> None:
        with sdpa_kernel(backend):
            for k, v in caches.layers:
                F.scaled_dot_product_attention(query, k, v, enable_gqa=not packed)

    return run, len(caches.layers)


def flex(caches: Caches) -> tuple[Run, int]:
    """FlexAttention's decoding kernel, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    query = caches.query[:, 0][:, :, None]

    def run() -> None:
        for k, v in caches.layers:
            compiled(query, k, v, enable_gqa=True)

    return run, len(caches.layers)


class Timer:
    """A contender's time per token and layer, in milliseconds; on a GPU from a CUDA graph."""

    def __init__(self, run: Run, count: int, device: str) -> None:
        self.run, self.count, self.device = run, count, device
        self.times: list[float] = []
        run()
        if device == "cuda":
            self.run = Recorded(run)
            self.run()

    def measure(self) -> None:
        """One more time."""
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.run()
            end.record()
            torch.cuda.synchronize()
            taken = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            self.run()
            taken = 1000 * (time.perf_counter() - begin)
        self.times.append(taken / self.count)

    def summary(self) -> dict[str, float]:
        """Median and quartiles in milliseconds."""
        low, middle, high = statistics.quantiles(self.times, n=4)
        return {"median": middle, "q1": low, "q3": high}


def dense_contenders(caches: Caches, setup: Setup, device: str) -> dict[str, Any]:
    """Everybody who reads all of the cache."""
    names = {"flash": SDPBackend.FLASH_ATTENTION}
    if device == "cuda":
        names |= {
            "cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }  # fmt: skip
    found: dict[str, Any] = {}
    for name, backend in names.items():
        for packed in (False, True):
            label = f"dense {name}{', packed' if packed else ''}"
            found[label] = lambda b=backend, p=packed: dense(caches, b, p)
    if device == "cuda" and (setup.tokens, setup.batch) in COMPILED:
        found["dense FlexAttention"] = lambda: flex(caches)
    return found


def our_contenders(
    caches: Caches, setup: Setup, sparsities: list[float]
) -> dict[str, Callable[[], tuple[Run, int, float]]]:
    """Ours by sparsity, and at the middle one with other choices."""
    found = {f"ours {s}": lambda s=s: ours(caches, setup, s) for s in sparsities}
    middle = sparsities[len(sparsities) // 2]
    found[f"ours {middle}, each token"] = lambda: ours(caches, setup, middle, "block")
    if caches.query.is_cuda and (setup.tokens, setup.batch) in COMPILED:
        label = f"ours {middle}, each token, compiled"
        found[label] = lambda: ours(caches, setup, middle, "block", compiled=True)
    found[f"ours {middle}, list per head"] = lambda: ours(caches, setup, middle, shared=False)
    return found


@torch.no_grad()
def measure(setup: Setup, device: str, rounds: int, sparsities: list[float]) -> dict[str, Any]:
    """Times all contenders of a setup in turns."""
    # Past eight compilations of one function the compiler gives up.
    torch.compiler.reset()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    caches = Caches(setup, device, dtype)
    results: dict[str, Any] = {}
    timers: dict[str, Timer] = {}
    contenders = dense_contenders(caches, setup, device) | our_contenders(caches, setup, sparsities)
    for name, make in contenders.items():
        results[name] = {}
        try:
            run, count, *read = make()
            timers[name] = Timer(run, count, device)
        except Exception as error:
            results[name] = {"refused": f"{type(error).__name__}: {error}"[:300]}
            continue
        if read:
            results[name]["share_of_blocks_read"] = read[0]
    for _ in range(rounds):
        for timer in timers.values():
            timer.measure()
    for name, timer in timers.items():
        results[name]["milliseconds"] = timer.summary()
    return {"setup": asdict(setup), "layers": len(caches.layers), "results": results}


def show(setup: Setup, record: dict[str, Any]) -> None:
    """Prints a setup's rows."""
    rows = {
        name: x["milliseconds"]["median"]
        for name, x in record["results"].items()
        if "milliseconds" in x
    }
    best = min((t for name, t in rows.items() if name.startswith("dense")), default=float("nan"))
    record["best_dense"] = best
    print(f"{setup}: microseconds per token and layer; best dense {1000 * best:.1f}")
    for name, taken in rows.items():
        ratio = "" if name.startswith("dense") else f"  {best / taken:6.2f} times dense"
        print(f"  {name:28} {1000 * taken:10.1f}{ratio}", flush=True)
    for name, x in record["results"].items():
        if "refused" in x:
            print(f"  {name:28} refused: {x['refused'][:120]}")


def launches() -> list[Any]:
    """Launches of the split kernel to try."""
    from dilated_attention_pytorch.ops.block_sparse_decode.triton_decode import LaunchConfig

    return [
        LaunchConfig(columns, warps, stages, splits)
        for columns in (32, 64, 128)
        for warps in (2, 4)
        for stages in (2, 3, 4, 5)
        for splits in (8, 16, 32, 64)
    ]


def tune(setup: Setup, lists: int) -> None:
    """Times the split kernel over its launches, ``lists`` lists of a twentieth of the blocks."""
    from dilated_attention_pytorch.ops.block_sparse_decode.arguments import DecodeArguments
    from dilated_attention_pytorch.ops.block_sparse_decode.triton_decode import launch_decode

    caches = Caches(setup, "cuda", torch.bfloat16)
    blocks = setup.tokens // BLOCK
    kept = blocks // 20
    order = torch.rand(setup.batch, lists, 1, blocks, device="cuda").argsort(-1)
    indices = order[..., :kept].sort(-1).values.int()
    counts = torch.full((setup.batch, lists, 1), kept, device="cuda", dtype=torch.int32)
    lengths = torch.full((setup.batch,), setup.tokens, device="cuda")
    out = torch.empty_like(caches.query[:, :1])
    lse = torch.empty(setup.batch, HEADS, 1, device="cuda")

    def attend(config: Any) -> None:
        for k, v in caches.layers:
            call = DecodeArguments(
                caches.query[:, :1], k.transpose(1, 2), v.transpose(1, 2), counts, indices,
                lengths, None, None, BLOCK, DIM**-0.5,
            )  # fmt: skip
            launch_decode(call, out, lse, config)

    rows = []
    for config in (None, *launches()):
        try:
            timer = Timer(lambda c=config: attend(c), len(caches.layers), "cuda")
        except Exception as error:
            print(f"  {config}: {type(error).__name__}")
            continue
        for _ in range(7):
            timer.measure()
        rows.append((timer.summary()["median"], str(config or "as built in")))
    print(f"{setup}, {lists} lists of {kept} blocks")
    for number, (taken, config) in enumerate(sorted(rows)):
        if number < 8 or config == "as built in":
            print(f"  {1000 * taken:8.2f} us  {config}", flush=True)


def main() -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="with --cpu")
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--batch", type=int, nargs="*")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.tune:
        for setup in (Setup(8192, 1), Setup(131072, 1), Setup(32768, 8)):
            for lists in (KV_HEADS, HEADS):
                tune(setup, lists)
        return 0
    device = "cpu" if arguments.cpu else "cuda"
    if arguments.cpu:
        torch.set_num_threads(arguments.threads)
    lengths = arguments.tokens or [
        2**n * 1024 for n in ((3, 4, 5, 6) if arguments.cpu else (3, 4, 5, 6, 7))
    ]
    batches = arguments.batch or ([1] if arguments.cpu else [1, 8])
    out = arguments.out or RESULTS / f"decode_{'cpu' if arguments.cpu else 'gpu'}.json"
    about = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "block_size": BLOCK}
    record: dict[str, Any] = {"environment": environment(device), "setup": about, "rows": []}
    if arguments.cpu:
        record["environment"] |= {"threads": arguments.threads, "load_average": os.getloadavg()[0]}
    for batch in batches:
        for tokens in lengths:
            setup = Setup(tokens, batch)
            row = measure(setup, device, arguments.rounds, [0.9, 0.95, 0.98])
            show(setup, row)
            record["rows"].append(row)
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
