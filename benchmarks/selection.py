"""What choosing the blocks costs, stage by stage, from 2,048 to 1,048,576 tokens.

    python benchmarks/selection.py              # one GPU, bfloat16, 16 heads of 128, block 64
    python benchmarks/selection.py --cpu        # linear candidates on the CPU, to 131,072 tokens
    # One length, without gradient, in seconds:
    python benchmarks/selection.py --shortest 32768 --longest 32768 --forward --out forward.json

On the GPU: time of each stage, of the whole selection, of attention, of dense attention (cuDNN;
extrapolated with the square of the length beyond the longest that is measured) and of the whole
layer, forward and step, with all blocks as candidates and with linear ones (``segment_lengths``);
one selection shared by the heads of a KV group and by several layers. Contenders take turns;
medians; the device is kept busy before every call. Writes ``results/selection.json`` or
``results/selection_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, block_sparse_attention
from dilated_attention_pytorch.nn.budget_layer import Scored
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs
from dilated_attention_pytorch.nn.select import choose_with_kernels
from dilated_attention_pytorch.ops.block_selection.interface import find_candidates
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import make_mask
from dilated_attention_pytorch.pattern import BlockPattern

sys.path.insert(0, str(Path(__file__).parent))
from gpu_setups import event_ms, fresh
from provenance import environment

RESULTS = Path(__file__).parent / "results"
LENGTHS = [2**n for n in range(11, 21)]
# Linear candidates: 64 near ones and 64 spread over 16,384 tokens, whatever the length.
SEGMENTS, RATES = [4096, 16384], [1, 4]
LONGEST_DENSE = 131072
Calls = dict[str, Callable[[], Any]]


def sparsity_of(tokens: int) -> float:
    """The sparsity that each length is measured at."""
    if tokens <= 65536:
        return 0.9
    return 0.95 if tokens <= 262144 else 0.98 if tokens <= 524288 else 0.99


def make_layer(
    sparsity: float, linear: bool, heads: int, kv_heads: int, dim: int, *,
    explored: float = 0.0, **more: Any,
) -> Any:  # fmt: skip
    """The adaptive layer with its default scorer, set to keep ``1 - sparsity`` of random input.

    ``explored`` is the share of random blocks of training, which count, too.
    """
    torch.manual_seed(0)
    # Unrelated content is kept at 27/17 of the base odds.
    wanted = 1 - sparsity - explored
    odds = wanted / (1 - wanted) * 17 / 27
    config = AdaptiveConfig(base_sparsity=1 / (1 + odds), **more)
    segments, rates = (SEGMENTS, RATES) if linear else (None, None)
    return BlockSparseAdaptive(segments, rates, heads, dim, config, num_kv_heads=kv_heads)


def selection_inputs(layer: Any, q: Tensor, k: Tensor) -> SelectionInputs:
    """What the layer's forward pass hands to ``select`` for a plain, non-causal call."""
    mask = make_mask(q.shape[0], q.shape[1], k.shape[1], device=q.device)
    found: SelectionInputs = layer._inputs(q, k, mask, None, True, None)
    return found


def stages(layer: Any, q: Tensor, k: Tensor) -> tuple[Calls, BlockPattern]:
    """Every stage as a call of its own, on what the stage before it made."""
    inputs, scoring = selection_inputs(layer, q, k), layer.scoring
    queries, keys, *_ = scoring.summarise(layer, inputs)
    scored: Scored = scoring.score(layer, inputs, kernels=True)
    budgets = layer.budget.rows(layer, scored)
    pattern = choose_with_kernels(layer, scored, budgets).pattern
    calls: Calls = {
        "candidates": lambda: find_candidates(inputs.rule, inputs.rows, inputs.intervals),
        "summaries": lambda: scoring.summarise(layer, inputs),
        "scores": lambda: scoring.products(layer, queries, keys, scored.numbers),
        "budget": lambda: layer.budget.rows(layer, scored),
        "choose": lambda: choose_with_kernels(layer, scored, budgets),
        "transpose": lambda: fresh(pattern).transpose(),
        "selection": lambda: select(layer, q, k).pattern.transpose(),
        "selection without transpose": lambda: select(layer, q, k),
    }
    return calls, pattern


def select(layer: Any, q: Tensor, k: Tensor) -> Selection:
    """Everything from q and k to the lists."""
    found: Selection = layer.select(selection_inputs(layer, q, k))
    return found


class Problem:
    """Inputs, layer and calls of one length."""

    def __init__(self, tokens: int, linear: bool, kv_heads: int = 16, **more: Any) -> None:
        self.tokens, self.linear, self.sparsity = tokens, linear, sparsity_of(tokens)
        self.layer = make_layer(self.sparsity, linear, 16, kv_heads, 128, **more).cuda().eval()
        torch.manual_seed(1)
        shapes = [(1, tokens, h, 128) for h in (16, kv_heads, kv_heads)]
        self.inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]

    def forward_calls(self) -> Calls:
        """Stages, attention on the chosen blocks, and the layer, without gradient."""
        q, k, v = self.inputs
        calls, pattern = stages(self.layer, q, k)
        self.kept = 1 - float(pattern.sparsity)
        calls["attention forward"] = lambda: block_sparse_attention(q, k, v, pattern)
        calls["layer forward"] = lambda: self.layer(q, k, v)
        return {name: no_grad(call) for name, call in calls.items()}

    def step_calls(self) -> Calls:
        """Attention alone and the layer in training, forward + backward; selection in training."""
        leaves = [x.clone().requires_grad_() for x in self.inputs]
        q, k, v = leaves
        grad = torch.randn_like(q)
        config = self.layer.config
        training = make_layer(
            self.sparsity, self.linear, 16, k.shape[2], 128,
            explored=config.num_explore_blocks * config.block_size / self.tokens,
            share_within_kv_group=config.share_within_kv_group,
        ).cuda()  # fmt: skip
        drawn = select(training, q, k)
        assert drawn.mass_probe is not None
        # With noise blocks are spread more evenly than without, and fewer reads meet in the cache.
        pattern = drawn.pattern
        self.kept_step = 1 - float(pattern.sparsity)
        probe = torch.zeros(pattern.kv_indices.shape, device="cuda", requires_grad=True)
        mass = torch.rand(drawn.mass_probe.shape, device="cuda")
        everything = [*leaves, *training.parameters()]

        def clear() -> None:
            for x in everything:
                x.grad = None

        def attend() -> None:
            clear()
            out = block_sparse_attention(q, k, v, fresh(pattern), mass_probe=probe)
            assert isinstance(out, Tensor)
            out.backward(grad)

        def train() -> None:
            clear()
            training(q, k, v).backward(grad)

        def choose() -> None:
            clear()
            probe = select(training, q, k).mass_probe
            assert probe is not None
            probe.backward(mass)

        return {"attention step": attend, "layer step": train, "selection step": choose}

    def dense_calls(self, step: bool) -> Calls:
        """PyTorch's dense attention through cuDNN."""
        leaves = [x.clone().requires_grad_(step) for x in self.inputs]
        grad = torch.randn_like(self.inputs[0])

        def attend() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = F.scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in leaves),
                    enable_gqa=leaves[0].shape[2] != leaves[1].shape[2],
                )
            return out.transpose(1, 2)

        def train() -> None:
            for x in leaves:
                x.grad = None
            attend().backward(grad)

        calls: Calls = {"dense forward": no_grad(attend)}
        return calls | {"dense step": train} if step else calls


def no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call without autograd."""

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def measure(calls: Calls, rounds: int) -> dict[str, Any]:
    """Median and quartiles of every call, which take turns, and its peak memory beyond inputs."""
    record: dict[str, Any] = {}
    for name, call in calls.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        record[name] = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(event_ms(call, 40_000_000))
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        record[name] |= {"median": middle, "q1": low, "q3": high}
    return record


def one_length(
    tokens: int, rounds: int, linear: bool, longest_step: int, forward: bool
) -> dict[str, Any]:
    """All calls of one length; with ``forward`` those without gradient, and no dense attention."""
    torch.cuda.empty_cache()
    problem = Problem(tokens, linear)
    torch.cuda.reset_peak_memory_stats()
    times = measure(problem.forward_calls(), rounds)
    record: dict[str, Any] = {
        "tokens": tokens, "sparsity": problem.sparsity, "linear": linear, "kept": problem.kept,
        "peak_gigabytes_forward": torch.cuda.max_memory_allocated() / 2**30, "times": times,
    }  # fmt: skip
    if forward:
        return record
    few = 3 if tokens > 65536 else rounds
    if tokens <= longest_step:
        times |= measure(problem.step_calls(), few)
        record["kept_step"] = problem.kept_step
    if not linear and tokens <= LONGEST_DENSE:
        times |= measure(problem.dense_calls(step=True), few)
    return record


def shared(rounds: int, tokens: int = 32768, layers: int = 4) -> dict[str, Any]:
    """One selection for the heads of a KV group, and one for several layers."""
    record: dict[str, Any] = {"tokens": tokens, "layers": layers}
    for name, more in (
        ("per head", {}),
        ("per KV group", {"share_within_kv_group": True}),
    ):
        torch.cuda.empty_cache()
        problem = Problem(tokens, False, kv_heads=4, **more)
        calls = problem.forward_calls()
        calls = {k: calls[k] for k in ("selection", "attention forward", "layer forward")}
        record[name] = measure(calls | problem.step_calls(), rounds)
    problem = Problem(tokens, False)
    q, k, v = problem.inputs

    def every() -> None:
        for _ in range(layers):
            problem.layer(q, k, v)

    def once() -> None:
        _, info = problem.layer(q, k, v, return_pattern=True)
        for _ in range(layers - 1):
            problem.layer(q, k, v, pattern=info["pattern"])

    problem.layer.pattern_info = lambda pattern: {"pattern": pattern, "sparsity": torch.zeros(1, 1)}
    calls = {f"{layers} layers, {layers} selections": every, f"{layers} layers, 1 selection": once}
    record["layers share"] = measure({n: no_grad(c) for n, c in calls.items()}, rounds)
    return record


def conclude(record: dict[str, Any]) -> dict[str, Any]:
    """Dense extrapolated, break-even, share of the ideal and the bars."""

    def of(row: dict[str, Any], name: str) -> float | None:
        found = row["times"].get(name, {}).get("median")
        return None if found is None else float(found)

    rows = [x for x in record["lengths"] if not x["linear"]]
    measured = [x for x in rows if of(x, "dense step") is not None]
    longest = max(measured, key=lambda x: x["tokens"])
    found: dict[str, Any] = {"rows": [], "dense_extrapolated_from": longest["tokens"]}
    for row in record["lengths"]:
        line: dict[str, Any] = {"tokens": row["tokens"], "linear": row["linear"]}
        for part in ("forward", "step"):
            same = [x for x in measured if x["tokens"] == row["tokens"]]
            factor = (row["tokens"] / longest["tokens"]) ** 2
            dense = of(same[0], f"dense {part}") if same else None
            dense = dense or factor * float(of(longest, f"dense {part}") or math.nan)
            layer = of(row, f"layer {part}")
            line[f"dense {part} ms"] = dense
            if layer is not None:
                line[f"times faster, {part}"] = dense / layer
                kept = row["kept" if part == "forward" else "kept_step"]
                line[f"share of ideal, {part}"] = dense * kept / layer
            attention = of(row, f"attention {part}")
            chosen = of(row, "selection" if part == "forward" else "selection step")
            if attention and chosen:
                line[f"selection / attention, {part}"] = chosen / attention
        found["rows"].append(line)
    for part in ("forward", "step"):
        faster = [
            x["tokens"] for x in found["rows"]
            if not x["linear"] and x.get(f"times faster, {part}", 0) > 1
        ]  # fmt: skip
        found[f"break-even {part}, tokens"] = min(faster, default=None)
    linear = [x for x in record["lengths"] if x["linear"] and x["tokens"] >= 8192]
    for name in ("median", "peak_bytes"):
        values = [(x["tokens"], x["times"]["selection without transpose"][name]) for x in linear]
        found[f"linear candidates: slope of log {name}"] = slope(values)
    return found


def slope(points: list[tuple[int, float]]) -> float | None:
    """Least-squares exponent: 1 is linear, 2 quadratic."""
    if len(points) < 2:
        return None
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    fit = statistics.linear_regression(xs, ys)
    return fit.slope


def show(row: dict[str, Any]) -> None:
    """Prints one length."""
    kind = "linear" if row["linear"] else "all"
    print(f"{row['tokens']:>8} tokens, candidates {kind}, kept {row['kept']:.4f}, "
          f"peak {row['peak_gigabytes_forward']:.1f} GiB")  # fmt: skip
    for name, value in row["times"].items():
        print(f"    {name:28} {value['median']:10.3f} ms  {value['peak_bytes'] / 2**20:10.1f} MiB",
              flush=True)  # fmt: skip


def on_gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole record on one GPU."""
    record: dict[str, Any] = {"environment": environment("cuda"), "lengths": []}
    for linear in (False, True):
        for tokens in LENGTHS:
            if not arguments.shortest <= tokens <= arguments.longest:
                continue
            if linear and tokens < 8192:
                continue
            rounds = arguments.rounds if tokens <= 65536 else 5
            try:
                row = one_length(tokens, rounds, linear, 131072, arguments.forward)
            except torch.OutOfMemoryError as error:
                lost = {"tokens": tokens, "linear": linear, "error": str(error)[:200]}
                record.setdefault("out_of_memory", []).append(lost)
                print(lost, flush=True)
                continue
            record["lengths"].append(row)
            show(row)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.forward:
        return record
    if not arguments.skip_sharing:
        record["sharing"] = shared(arguments.rounds)
        print(json.dumps(record["sharing"], indent=1))
    record["conclusions"] = conclude(record)
    print(json.dumps(record["conclusions"], indent=1))
    return record


def on_cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """Linear candidates in PyTorch: seconds and memory of the selection, without gradient."""
    record: dict[str, Any] = {"environment": environment("cpu"), "lengths": []}
    layer = make_layer(0.95, True, 8, 8, 64).eval()
    for tokens in [n for n in LENGTHS if 8192 <= n <= min(arguments.longest, 131072)]:
        q, k = (torch.randn(1, tokens, 8, 64) for _ in range(2))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            with torch.no_grad():
                select(layer, q, k)
            times.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record["lengths"].append({"tokens": tokens, "seconds": min(times), "peak_rss_bytes": peak})
        print(record["lengths"][-1], flush=True)
    points = [(x["tokens"], x["seconds"]) for x in record["lengths"]]
    record["slope of log seconds"] = slope(points)
    # Below, tensors are small enough that the allocator hands out pages it has already touched.
    record["slope of log seconds, from 32,768 tokens"] = slope([p for p in points if p[0] >= 32768])
    rows = record["lengths"]
    record["bytes per token, shortest to longest"] = (
        rows[-1]["peak_rss_bytes"] - rows[0]["peak_rss_bytes"]
    ) / max(rows[-1]["tokens"] - rows[0]["tokens"], 1)
    print({name: value for name, value in record.items() if name not in ("lengths", "environment")})
    return record


def main() -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shortest", type=int, default=LENGTHS[0])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--skip-sharing", action="store_true")
    parser.add_argument(
        "--forward", action="store_true", help="leave out training, dense attention and sharing"
    )
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    name = "selection_cpu.json" if arguments.cpu else "selection.json"
    arguments.out = arguments.out or RESULTS / name
    record = on_cpu(arguments) if arguments.cpu else on_gpu(arguments)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
