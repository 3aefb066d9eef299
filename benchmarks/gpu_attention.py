"""Block-sparse attention against its rivals on one GPU.

    python benchmarks/gpu_attention.py            # the speed bars, bfloat16
    python benchmarks/gpu_attention.py --sweep    # also step time by sparsity and by length
    python benchmarks/gpu_attention.py --float32  # float32 alone: gpu_attention_float32.json

Patterns are random with the same share of tiles for everybody, at each one's best block size.
A step is forward + backward; ours counts the transpose of a fresh pattern and, in "ours", the
selector's by-product (tile mass). Contenders of a setup take turns, in a new order each round;
medians. Writes
``results/gpu_attention.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dilated_attention_pytorch import BlockPattern, block_sparse_attention

sys.path.insert(0, str(Path(__file__).parent))
from gpu_setups import Setup, event_ms, float32_setup, fresh, inputs, random_pattern
from provenance import environment

OUT = Path(__file__).parent / "results" / "gpu_attention.json"
OUT_FLOAT32 = OUT.with_name("gpu_attention_float32.json")

BARS = {
    "block 128": Setup(block_size=128),
    "block 64": Setup(block_size=64),
    "head_dim 64, causal": Setup(head_dim=64, causal=True),
    "4 query heads per KV head": Setup(kv_heads=4),
}
SWEEP = {
    **{f"sparsity {s}": Setup(sparsity=s) for s in (0.5, 0.7, 0.8, 0.95)},
    **{f"{n} tokens": Setup(tokens=n) for n in (2048, 4096, 8192, 16384, 65536)},
}
FLOAT32 = {
    f"block {block}, head_dim {dim}": float32_setup(block, dim)
    for block, dim in ((16, 32), (16, 64), (32, 64), (64, 64), (64, 128))
}
LARGEST = Setup(tokens=131072, sparsity=0.95)

HAS_FLASH4 = importlib.util.find_spec("cutlass") is not None

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(setup: Setup, mass: bool, backend: str = "triton") -> Attend:
    """Our kernels (or FlashAttention-4 through our op), on a fresh pattern each time."""
    pattern = random_pattern(setup)
    probe = torch.zeros(pattern.kv_indices.shape, device="cuda", requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = block_sparse_attention(
            q, k, v, fresh(pattern), causal=setup.causal, backend=backend,
            mass_probe=probe if mass and q.requires_grad else None,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return attend


def dense(setup: Setup, backend: SDPBackend) -> Attend:
    """PyTorch's dense attention with one of its kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=setup.causal, enable_gqa=setup.heads != setup.kv_heads
            )
        return out.transpose(1, 2)

    return attend


def _not_future(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def flex(setup: Setup, block_size: int) -> Attend:
    """FlexAttention, compiled; tiles without a mask are marked full, which spares it the mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    pattern = random_pattern(setup, block_size)
    every = pattern.to_dense().repeat_interleave(setup.heads // setup.kv_heads, 1)
    diagonal = torch.eye(every.shape[-1], dtype=torch.bool, device="cuda")
    masked = every & diagonal if setup.causal else torch.zeros_like(every)

    def lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True).int()
        return tiles.sum(-1, dtype=torch.int32), order

    mask = BlockMask.from_kv_blocks(
        *lists(masked), *lists(every & ~masked), BLOCK_SIZE=block_size,
        mask_mod=_not_future if setup.causal else None,
    )  # fmt: skip

    # It refuses tiles larger than the mask's blocks unless told.
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if block_size == 64 else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = compiled(
            q, k, v, block_mask=mask, enable_gqa=setup.heads != setup.kv_heads,
            kernel_options=options,
        )  # fmt: skip
        return out.transpose(1, 2)

    return attend


def flash4(setup: Setup, sparse: bool) -> Attend:
    """FlashAttention-4 itself: dense, or block-sparse at 128 with its lists made beforehand."""
    from flash_attn.cute.interface import flash_attn_func

    from dilated_attention_pytorch.ops.block_sparse_attention import flash

    options: dict[str, Any] = {"causal": setup.causal}
    if sparse:
        pattern = random_pattern(setup, flash.BLOCK)
        transpose = pattern.transpose()
        query = torch.empty(1, setup.tokens, setup.heads, setup.head_dim, device="meta")
        rows = flash.row_lists(query, pattern.kv_num_blocks, pattern.kv_indices, setup.causal)
        columns = flash.column_lists(
            query, pattern.kv_indices, transpose.offsets, transpose.slots, setup.causal
        )
        options = {
            "mask_mod": flash.causal_mask() if setup.causal else None,
            "block_sparse_tensors": flash.tiles(rows),
            "block_sparse_tensors_bwd": flash.tiles(columns),
            "pack_gqa": False,
        }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


def contenders(setup: Setup, quick: bool, slow: bool = True) -> dict[str, Callable[[], Attend]]:
    """Everybody in a setup; ``slow``: also those that lose to others of their kind."""
    if setup.dtype == "float32":
        return {
            "ours": lambda: ours(setup, mass=True),
            "dense, memory-efficient": lambda: dense(setup, SDPBackend.EFFICIENT_ATTENTION),
        }
    grouped = setup.heads != setup.kv_heads
    found: dict[str, Callable[[], Attend]] = {
        "ours": lambda: ours(setup, mass=True),
        "dense cuDNN": lambda: dense(setup, SDPBackend.CUDNN_ATTENTION),
        "FlexAttention, block 128": lambda: flex(setup, 128),
    }
    if HAS_FLASH4:
        found["dense FlashAttention-4"] = lambda: flash4(setup, sparse=False)
        found["FlashAttention-4, block 128"] = lambda: flash4(setup, sparse=True)
    if quick:
        return found
    if HAS_FLASH4 and setup.block_size == 128:
        found["ours, flash"] = lambda: ours(setup, mass=True, backend="flash")
        found["ours, flash_atomic"] = lambda: ours(setup, True, "flash_atomic")
        found["ours, flash_atomic, without tile mass"] = lambda: ours(setup, False, "flash_atomic")
    found["ours, without tile mass"] = lambda: ours(setup, mass=False)
    if slow:
        found["dense flash"] = lambda: dense(setup, SDPBackend.FLASH_ATTENTION)
    if slow and setup.block_size < 128:
        found[f"FlexAttention, block {setup.block_size}"] = lambda: flex(setup, setup.block_size)
    if grouped:
        ungrouped = replace(setup, kv_heads=setup.heads)
        found["ours, ungrouped"] = lambda: ours(ungrouped, mass=True)
    return found


class Runner:
    """One contender's forward pass and step."""

    def __init__(self, setup: Setup, attend: Attend) -> None:
        self.attend = attend
        self.inputs = inputs(setup, grad=True)
        self.grad = torch.randn_like(self.inputs[0])

    def forward(self) -> None:
        with torch.no_grad():
            self.attend(*(x.detach() for x in self.inputs))

    def step(self) -> None:
        for x in self.inputs:
            x.grad = None
        self.attend(*self.inputs).backward(self.grad)


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


def measure(setup: Setup, rounds: int, quick: bool = False, slow: bool = True) -> dict[str, Any]:
    """Times all contenders of a setup in turns."""
    # Past eight compilations of one function the compiler gives up.
    torch.compiler.reset()
    results: dict[str, Any] = {}
    runners: dict[str, dict[str, Callable[[], None]]] = {}
    for name, make in contenders(setup, quick, slow).items():
        own = replace(setup, kv_heads=setup.heads) if name == "ours, ungrouped" else setup
        results[name] = {}
        runner = Runner(own, make())
        runners[name] = {}
        for part, call in (("forward", runner.forward), ("step", runner.step)):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                call()
                torch.cuda.synchronize()
                call()
                torch.cuda.synchronize()
            except Exception as error:
                results[name][part] = {"refused": f"{type(error).__name__}: {error}"[:300]}
                continue
            peak = torch.cuda.max_memory_allocated() - before
            results[name][part] = {"peak_bytes_beyond_inputs": peak}
            runners[name][part] = call
    for part in ("forward", "step"):
        times: dict[str, list[float]] = {n: [] for n in runners if part in runners[n]}
        order, shuffle = list(times), random.Random(0).shuffle
        for _ in range(rounds):
            # The card's clock depends on who ran before: nobody always follows the same.
            shuffle(order)
            for name in order:
                times[name].append(event_ms(runners[name][part]))
        for name, values in times.items():
            results[name][part] |= summary(values)
            results[name][part]["tflops"] = _tflops(setup, name, part, values)
    return {"setup": asdict(setup), "results": results}


def _tflops(setup: Setup, name: str, part: str, values: list[float]) -> float:
    """TFLOP/s on computed tiles: 4·d flops per pair forward, 2.5 times that backward."""
    pairs = setup.tokens**2 * (0.5 if setup.causal else 1)
    if not name.startswith("dense"):
        pairs *= 1 - setup.sparsity
    flops = 4 * setup.head_dim * setup.heads * pairs * (1 if part == "forward" else 3.5)
    return flops / statistics.median(values) / 1e9


def peak_gigabytes(setup: Setup) -> float:
    """Peak memory of one step of ours, inputs and gradients included."""
    pattern: BlockPattern = random_pattern(setup)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    q, k, v = inputs(setup, grad=True)
    probe = torch.zeros(pattern.kv_indices.shape, device="cuda", requires_grad=True)
    out = block_sparse_attention(q, k, v, pattern, mass_probe=probe, backend="triton")
    assert isinstance(out, Tensor)
    out.backward(torch.randn_like(out))
    return torch.cuda.max_memory_allocated() / 2**30


def break_even(rounds: int) -> list[dict[str, Any]]:
    """Step of ours against dense cuDNN at short lengths, block 64, sparsity 0.9."""
    rows = []
    for head_dim in (64, 128):
        for tokens in (512, 1024, 2048, 4096):
            setup = Setup(tokens=tokens, head_dim=head_dim)
            calls = {
                "ours": Runner(setup, ours(setup, mass=True)).step,
                "dense cuDNN": Runner(setup, dense(setup, SDPBackend.CUDNN_ATTENTION)).step,
            }
            times: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(rounds + 2):
                for name, call in calls.items():
                    taken = event_ms(call)
                    if turn >= 2:
                        times[name].append(taken)
            medians = {name: statistics.median(values) for name, values in times.items()}
            rows.append({"head_dim": head_dim, "tokens": tokens, "step_ms": medians})
    return rows


def show(name: str, record: dict[str, Any]) -> None:
    """Prints a setup's rows."""
    print(name)
    for contender, parts in record["results"].items():
        row = [f"{parts[p].get('median', float('nan')):9.3f}" for p in ("forward", "step")]
        share = [f"{parts[p].get('tflops', float('nan')):6.0f}" for p in ("forward", "step")]
        print(f"  {contender:28} ms {' '.join(row)}  TFLOP/s {' '.join(share)}", flush=True)


def main() -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--quick", action="store_true", help="leave out what loses anyway")
    parser.add_argument(
        "--setups", nargs="+", choices=[*BARS], help="these alone, and no more (default: all)"
    )
    parser.add_argument("--float32", action="store_true", help="float32 alone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": environment("cuda"), "bars": {}, "sweep": {}}
    bars = FLOAT32 if arguments.float32 else BARS
    out = arguments.out or (OUT_FLOAT32 if arguments.float32 else OUT)
    for name in arguments.setups or bars:
        setup = bars[name]
        record["bars"][name] = measure(setup, arguments.rounds, slow=not arguments.quick)
        show(name, record["bars"][name])
        out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.setups or arguments.float32:
        return 0
    record["peak_gigabytes"] = {"setup": asdict(LARGEST), "step": peak_gigabytes(LARGEST)}
    print(f"peak at {LARGEST.tokens} tokens: {record['peak_gigabytes']['step']:.2f} GiB")
    record["break_even"] = break_even(arguments.rounds)
    for row in record["break_even"]:
        print(f"head_dim {row['head_dim']}, {row['tokens']} tokens: {row['step_ms']}")
    out.write_text(json.dumps(record, indent=1) + "\n")
    for name, setup in SWEEP.items() if arguments.sweep else ():
        record["sweep"][name] = measure(setup, arguments.rounds, quick=True)
        show(name, record["sweep"][name])
        out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
