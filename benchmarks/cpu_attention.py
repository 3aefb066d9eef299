"""Adaptive attention against dense causal attention on the CPU, selection included.

    python benchmarks/cpu_attention.py

Measures forward (evaluation, no gradient) and forward + backward (training, with the selector's
signal; once with the default random blocks, which lower the sparsity, and once without), each
with the kernel that is compiled at first use (``adaptive``) and on PyTorch's operators alone
(``gather``), interleaved with PyTorch's dense causal attention, and the peak memory of one process
that runs forward + backward at 32,768 tokens. Writes ``results/cpu_attention.json``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, explain_backend

sys.path.insert(0, str(Path(__file__).parent))
from provenance import environment

HEADS, HEAD_DIM = 8, 64
# Forward passes of so many tokens until the budget keeps what is asked for.
SETTLING, SETTLED_ON = 60, 2048
OUT = Path(__file__).parent / "results" / "cpu_attention.json"


def inputs(tokens: int, grad: bool) -> list[Tensor]:
    """Random queries, keys and values."""
    torch.manual_seed(0)
    return [torch.randn(1, tokens, HEADS, HEAD_DIM, requires_grad=grad) for _ in "qkv"]


def layer(training: bool, explore: bool = True, backend: str = "auto") -> BlockSparseAdaptive:
    """The layer with its default settings, choosing from all blocks.

    Its budget is settled on inputs like those that it is measured on: an untrained one keeps half
    as much again of noise, and training holds the mean that was asked for.
    """
    config = AdaptiveConfig(num_explore_blocks=2 if explore else 0)
    made = BlockSparseAdaptive(None, None, HEADS, HEAD_DIM, config, backend=backend)
    with torch.no_grad():
        for _ in range(SETTLING):
            noise = (torch.randn(1, SETTLED_ON, HEADS, HEAD_DIM) for _ in "qkv")
            made.train()(*noise, is_causal=True)
    return made.train(training)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's dense causal attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(tokens: int, backward: bool, explore: bool, repeats: int) -> dict[str, Any]:
    """Times both, one after the other, ``repeats`` times after one warm-up."""
    q, k, v = inputs(tokens, backward)
    layers = {
        "adaptive": layer(backward, explore),
        "gather": layer(backward, explore, backend="gather"),
    }

    def run(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        with torch.set_grad_enabled(backward):
            out = attend(q, k, v)
        if backward:
            out.sum().backward()

    contenders: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        name: functools.partial(ours, is_causal=True) for name, ours in layers.items()
    }
    contenders["dense"] = dense
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, attend in contenders.items():
            taken = timed(lambda attend=attend: run(attend))
            if number:
                seconds[name].append(taken)
    ours = layers["adaptive"]
    _, info = ours(q, k, v, is_causal=True, return_pattern=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens": tokens,
        "what": "forward + backward, training" if backward else "forward, evaluation",
        "random_blocks": ours.config.num_explore_blocks if backward else 0,
        "sparsity": float(info["pattern"].sparsity),
        "median_seconds": medians,
        "quartile_seconds": {n: statistics.quantiles(x, n=4)[::2] for n, x in seconds.items()},
        "range_seconds": {name: [min(x), max(x)] for name, x in seconds.items()},
        "ratio": medians["dense"] / medians["adaptive"],
        "ratio_gather": medians["dense"] / medians["gather"],
        "backend": explain_backend(q, k, v, info["pattern"], causal=True),
    }


def peak_gigabytes(tokens: int) -> float:
    """Peak memory of this process after one training step of the layer."""
    q, k, v = inputs(tokens, True)
    layer(training=True)(q, k, v, is_causal=True).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> int:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--peak", type=int, help="print the peak memory at so many tokens and end")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.peak:
        print(peak_gigabytes(arguments.peak))
        return 0
    rows = [
        compare(arguments.tokens, backward, explore, arguments.repeats)
        for backward, explore in ((False, False), (True, True), (True, False))
    ]
    command = [sys.executable, __file__, "--peak", "32768"]
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    result = {
        "rows": rows,
        "peak_gigabytes_at_32768": peak,
        "setup": {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "block_size": 64},
        "environment": environment("cpu")
        | {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]},
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
