"""Small forward and backward passes of the Triton kernels, for compute-sanitizer to watch.

    python benchmarks/sanitize.py                        # alone: compares with float64
    compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    python benchmarks/sanitize.py --dtype float16 --record benchmarks/results/sanitizer_float16.json

With ``--record`` it runs alone first (which also compiles the kernels), then under memcheck and
racecheck, and writes commands, summaries and versions. Exit codes: 0 clean; 1 a result disagrees
with the reference, or the sanitizer reports an error; 2 no CUDA device or no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import BlockPattern, block_sparse_attention
from provenance import environment

TOOLS = ("memcheck", "racecheck")
# Largest difference from float64, absolute and relative, by dtype. In bfloat16 the rounding of the
# output, which the backward pass reads, takes up 0.02 in dK already where P is not rounded.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 3e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the op; ``options`` holds further arguments, lists of integers as tensors."""

    name: str
    q_len: int
    kv_len: int
    block_q: int = 64
    block_k: int = 64
    heads: int = 2
    kv_heads: int = 2
    pattern_heads: int = 2
    head_dim: int = 64
    keep: float = 0.6
    by_products: bool = True
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case(name="whole blocks", q_len=256, kv_len=256),
    Case(name="causal, partial blocks", q_len=200, kv_len=200, options={"causal": True}),
    Case(name="no by-products", q_len=200, kv_len=200, by_products=False),
    Case(
        name="grouped heads, shared lists", q_len=160, kv_len=160, heads=8, pattern_heads=2,
        options={"causal": True},
    ),
    Case(name="grouped heads, own lists", q_len=130, kv_len=130, heads=4, pattern_heads=4),
    Case(name="one list for all", q_len=130, kv_len=130, heads=4, pattern_heads=1),
    Case(name="key lengths", q_len=150, kv_len=150, options={"key_lengths": [150, 33]}),
    Case(
        name="documents", q_len=150, kv_len=150,
        options={"causal": True, "cu_seqlens": [[0, 70, 150], [0, 33, 100]]},
    ),
    Case(
        name="offset per sample", q_len=70, kv_len=150,
        options={"causal": True, "query_offset": [3, 80]},
    ),
    Case(name="fewer queries", q_len=1, kv_len=150, options={"causal": True}),
    Case(name="nothing kept", q_len=100, kv_len=100, keep=0.0),
    Case(name="blocks of 16", q_len=100, kv_len=100, block_q=16, block_k=16),
    Case(name="blocks of 32 and 128", q_len=200, kv_len=300, block_q=32, block_k=128),
    Case(name="blocks of 128", q_len=300, kv_len=300, block_q=128, block_k=128, head_dim=128),
    Case(name="odd head_dim", q_len=100, kv_len=100, head_dim=40),
    Case(name="head_dim 256", q_len=130, kv_len=130, head_dim=256),
)  # fmt: skip


def run_case(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest differences from the float64 reference, in units of the tolerance.

    The reference runs on the CPU: the sanitizer has nothing to watch there.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tiles = (-(-case.q_len // case.block_q), -(-case.kv_len // case.block_k))
    dense = torch.rand(2, case.pattern_heads, *tiles, generator=generator) < case.keep
    pattern = BlockPattern.from_dense(
        dense, q_len=case.q_len, kv_len=case.kv_len, block_size=(case.block_q, case.block_k)
    )
    query = (2, case.q_len, case.heads, case.head_dim)
    key = (2, case.kv_len, case.kv_heads, case.head_dim)
    inputs = [randn(*shape).to(dtype) for shape in (query, key, key)]
    # Rounded: the op's output gradient has the dtype of its output.
    weight = randn(*query).to(dtype)
    bias = randn(*pattern.kv_indices.shape)

    def step(backend: str, where: str, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        options = {
            k: torch.tensor(v, device=where) if isinstance(v, list) else v
            for k, v in case.options.items()
        }
        leaves = dict(zip("qkv", (x.to(where, dtype, copy=True) for x in inputs), strict=True))
        if case.by_products:
            leaves["block_bias"] = bias.to(where, wide, copy=True)
            leaves["mass_probe"] = torch.zeros_like(leaves["block_bias"])
        for x in leaves.values():
            x.requires_grad_()
        extra = {k: x for k, x in leaves.items() if len(k) > 1}
        out, lse = block_sparse_attention(
            *(leaves[k] for k in "qkv"), pattern.to(where), backend=backend, return_lse=True,
            **extra, **options,
        )  # fmt: skip
        finite = torch.where(lse.isfinite(), lse, 0)
        ((out * weight.to(where, wide)).sum() + finite.sum()).backward()
        # Nothing reaches the bias where no tile is kept.
        grads = {
            f"d {k}": torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()
        }
        found = {"out": out, "lse": finite, **grads}
        return {k: x.detach().double().cpu() for k, x in found.items()}

    got, want = step("triton", device, dtype), step("reference", "cpu", torch.float64)
    limit = TOLERANCE[dtype]
    return {
        name: float(((got[name] - want[name]).abs() / (limit + limit * want[name].abs())).max())
        if want[name].numel()
        else 0.0
        for name in want
    }


def run_all(device: str, only: str | None = None) -> int:
    """Runs every case in every dtype (or ``only`` one); prints a line for each.

    Returns the number of failures.
    """
    failures = 0
    kinds = [x for x in TOLERANCE if only is None or str(x) == f"torch.{only}"]
    for case in CASES:
        for dtype in kinds:
            off = run_case(case, dtype, device)
            # Written so that NaN fails.
            bad = [name for name, size in off.items() if not size <= 1]
            failures += bool(bad)
            verdict = f"DISAGREES in {', '.join(bad)}" if bad else "ok"
            kind = str(dtype).removeprefix("torch.")
            print(f"{case.name}, {kind}: {verdict} ({max(off.values()):.2f} of the tolerance)")
    print(f"{len(CASES) * len(kinds)} runs, {failures} disagree")
    return failures


def watch(tool: str, sanitizer: str, limit: float, only: str | None) -> dict[str, Any]:
    """Runs this program under one tool of compute-sanitizer.

    Args:
        tool: ``"memcheck"`` or ``"racecheck"``.
        sanitizer: Path of the program.
        limit: Seconds.
        only: The one dtype to run, or None: all.
    """
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__]
    command += [] if only is None else ["--dtype", only]
    # Caching hands out parts of larger blocks, whose neighbours memcheck could not tell apart.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit,
            env={**os.environ, **settings},
        )  # fmt: skip
        code, lines = done.returncode, (done.stdout + done.stderr).splitlines()
    except subprocess.TimeoutExpired:
        code, lines = -1, [f"stopped after {limit} seconds"]
    found = [x for x in lines if x.startswith("=========")]
    verdicts = [x for x in lines if "runs, " in x or "stopped after" in x]
    program = command.index(sys.executable)
    shown = [Path(sanitizer).name, *command[1:program], "python", "benchmarks/sanitize.py"]
    shown += command[program + 2 :]
    return {
        "tool": tool,
        "command": " ".join(shown),
        "environment": settings,
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "summary": [x for x in found if "SUMMARY" in x] + verdicts,
        # Enough to see what went wrong; the summary line alone where nothing did.
        "report": found[:60] if code else [],
        "clean": code == 0 and any("SUMMARY: 0" in x for x in found),
    }


def record(path: Path, sanitizer: str | None, limit: float, only: str | None) -> int:
    """Runs alone and under every tool; writes the result. Returns the exit code."""
    program = sanitizer or shutil.which("compute-sanitizer")
    if program is None and Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        program = "/usr/local/cuda/bin/compute-sanitizer"
    if program is None:
        print("compute-sanitizer is not installed; give its path with --sanitizer.")
        return 2
    if run_all("cuda", only):
        return 1
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    results = [watch(tool, program, limit, only) for tool in TOOLS]
    about = {
        **environment("cuda"),
        "compute_sanitizer": version.stdout.strip().splitlines()[-1:],
        "cases": [case.name for case in CASES],
        "dtypes": [str(dtype) for dtype in TOLERANCE] if only is None else [only],
    }
    path.write_text(json.dumps({"environment": about, "runs": results}, indent=1) + "\n")
    for result in results:
        print(f"{result['tool']}: exit code {result['exit_code']}, {result['summary']}")
    return 0 if all(result["clean"] for result in results) else 1


def main() -> int:
    """Reads the command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, help="start compute-sanitizer and write this JSON")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer (default: search)")
    parser.add_argument("--limit", type=float, default=280, help="seconds for each tool")
    parser.add_argument("--dtype", help="run in this one alone, e.g. float16")
    options = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and (options.record or not interpreted):
        print("sanitize.py needs a CUDA device; with TRITON_INTERPRET=1 it runs alone without one.")
        return 2
    if options.record:
        return record(options.record, options.sanitizer, options.limit, options.dtype)
    return 1 if run_all("cpu" if interpreted else "cuda", options.dtype) else 0


if __name__ == "__main__":
    sys.exit(main())
