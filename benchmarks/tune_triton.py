"""Times launch configurations of the Triton kernels, on a GPU.

    python benchmarks/tune_triton.py              # bfloat16
    python benchmarks/tune_triton.py --small      # blocks of 16 and 32: tune_triton_small.json
    python benchmarks/tune_triton.py --float32    # tune_triton_float32.json

For each setup of the speed bars: every forward configuration; the backward pass with every dK, dV
configuration; then with every dQ configuration beside the best of those. Writes
``results/tune_triton.json``, from which the launch configurations in ``triton_tiles.py`` are
chosen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch import BlockPattern
from dilated_attention_pytorch.ops.block_sparse_attention.triton_backward import launch_backward
from dilated_attention_pytorch.ops.block_sparse_attention.triton_forward import launch_forward
from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import Call, LaunchConfig

sys.path.insert(0, str(Path(__file__).parent))
from gpu_setups import Setup, float32_setup, inputs, median_ms, random_pattern
from provenance import environment

OUT = Path(__file__).parent / "results" / "tune_triton.json"
OUT_SMALL = OUT.with_name("tune_triton_small.json")
OUT_FLOAT32 = OUT.with_name("tune_triton_float32.json")
Config = LaunchConfig

SETUPS = {
    "block 64, head_dim 128": Setup(block_size=64, head_dim=128),
    "block 128, head_dim 128": Setup(block_size=128, head_dim=128),
    "block 64, head_dim 64, causal": Setup(block_size=64, head_dim=64, causal=True),
    "4 query heads per KV head": Setup(kv_heads=4),
}
SMALL_SETUPS = {
    f"block {block}, head_dim {dim}, causal": Setup(8192, 8, 8, dim, block, causal=True)
    for block, dim in ((16, 32), (16, 64), (32, 64), (32, 128))
}
FLOAT32_SETUPS = {
    f"float32, block {block}, head_dim {dim}": float32_setup(block, dim)
    for block, dim in ((16, 32), (32, 64), (64, 64), (64, 128))
}

# Query rows, key columns, warps, stages, registers per thread (none named: free).
SMALL = {
    size: [(size, size, warps, stages) for warps in (1, 2, 4) for stages in (1, 2, 3, 4)]
    for size in (16, 32)
}
FORWARD = {
    **SMALL,
    64: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 3, 128)],
    128: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
}
KEY = {
    **SMALL,
    64: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2, 168), (64, 64, 4, 3, 168)],
    128: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2)],
}
QUERY = {
    **SMALL,
    64: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2, 128)],
    128: [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2)],
}
# Of every kernel in float32.
FLOAT32 = {
    16: [(16, 16, 1, 1), (16, 16, 2, 1), (16, 16, 4, 1)],
    32: [(16, 32, 2, 1), (32, 16, 4, 1), (32, 32, 2, 1), (32, 32, 4, 1)],
    64: [(16, 32, 2, 1), (32, 16, 4, 1), (32, 32, 4, 1), (64, 32, 4, 1), (64, 64, 4, 1)],
}


def variants(setup: Setup, of: Mapping[int, Any]) -> list[Any]:
    """Configurations to try."""
    return (FLOAT32 if setup.dtype == "float32" else of)[setup.block_size]


@dataclass
class Job:
    """A call, its tensors and its transpose."""

    call: Call
    pattern: BlockPattern
    out: torch.Tensor
    lse: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def make(cls, setup: Setup) -> Job:
        q, k, v = inputs(setup)
        pattern = random_pattern(setup)
        call = Call(
            q, k, v, pattern.kv_num_blocks, pattern.kv_indices, None, None, None, None, None,
            setup.block_size, setup.block_size, setup.causal, 0, setup.head_dim**-0.5,
        )  # fmt: skip
        lse = torch.empty(1, setup.heads, setup.tokens, device="cuda")
        job = cls(call, pattern, torch.empty_like(q), lse, torch.randn_like(q))
        job.forward(None)
        return job

    def forward(self, config: Config | None) -> None:
        launch_forward(self.call, self.out, self.lse, config)

    def backward(self, key: Config | None, query: Config | None, overlap: bool = True) -> None:
        transpose = self.pattern.transpose()
        launch_backward(
            self.call, self.out, self.lse, self.grad, None, transpose.offsets, transpose.slots,
            False, True, config=key, config_query=query, overlap=overlap,
        )  # fmt: skip


def attempt(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds, or infinity for what the GPU cannot hold."""
    try:
        call()
        torch.cuda.synchronize()
        return median_ms(call, repeats)
    except Exception as error:
        print("   ", type(error).__name__, str(error).splitlines()[0][:90], flush=True)
        return float("inf")


def time_setup(setup: Setup, repeats: int) -> list[dict[str, Any]]:
    """All timings of one setup."""
    job, rows = Job.make(setup), []

    def record(part: str, label: Any, call: Callable[[], Any]) -> float:
        taken = attempt(call, repeats)
        rows.append({"part": part, "config": label, "ms": taken if taken < 1e9 else None})
        return taken

    for variant in variants(setup, FORWARD):
        config = Config(*variant)
        record("forward", variant, partial(job.forward, config))
    timed = {}
    for variant in variants(setup, KEY):
        config = Config(*variant)
        timed[config] = record("backward, dK dV", variant, partial(job.backward, config, None))
    best = min(timed, key=lambda config: timed[config])
    for variant in variants(setup, QUERY):
        config = Config(*variant)
        record("backward, dQ", [astuple(best), variant], partial(job.backward, best, config))
    alone = partial(job.backward, best, None, overlap=False)
    record("backward, kernels not overlapped", astuple(best), alone)
    record("backward, kernels overlapped", astuple(best), partial(job.backward, best, None))
    return rows


def compile_only(task: tuple[str, str, Any]) -> None:
    """Fills the compiler's cache; run side by side with others."""
    name, part, variant = task
    setup = (SETUPS | SMALL_SETUPS | FLOAT32_SETUPS)[name]
    job = Job.make(setup)
    if part == "forward":
        attempt(lambda: job.forward(Config(*variant)), 1)
    elif part == "backward":
        attempt(lambda: job.backward(Config(*variant), None), 1)
    else:
        attempt(lambda: job.backward(None, Config(*variant)), 1)


def main() -> int:
    """Times and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=8, help="compilers side by side")
    parser.add_argument("--small", action="store_true", help="blocks of 16 and 32 alone")
    parser.add_argument("--float32", action="store_true", help="float32 alone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tasks = []
    setups, out = SETUPS, OUT
    if arguments.small:
        setups, out = SMALL_SETUPS, OUT_SMALL
    if arguments.float32:
        setups, out = FLOAT32_SETUPS, OUT_FLOAT32
    for name, setup in setups.items():
        tasks += [(name, "forward", x) for x in variants(setup, FORWARD)]
        tasks += [(name, "backward", x) for x in variants(setup, KEY)]
        tasks += [(name, "dQ", x) for x in variants(setup, QUERY)]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        pool.map(compile_only, tasks, chunksize=1)
    results = {}
    for name, setup in setups.items():
        results[name] = time_setup(setup, arguments.repeats)
        print(name)
        for row in results[name]:
            print(f"  {row['part']:34} {row['config']!s:44} {row['ms'] or float('nan'):8.3f}")
    record = {"environment": environment("cuda"), "timings": results}
    (arguments.out or out).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
