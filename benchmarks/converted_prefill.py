"""Converted models against dense ones on one GPU: an attention layer, and a whole model.

    python benchmarks/converted_prefill.py

The layer has SmolLM2-135M's shape (9 query heads, 3 KV heads, head_dim 64) and a low-rank selector
with threshold budgets, blocks of 64. Its queries and keys are random with a part that all tokens of
a block share, so that some tiles matter more than others. Thresholds are calibrated on the same
inputs; the sparsity that came out is recorded. The model is a random Llama of the same shape, its
query projections scaled up so that attention is not uniform, run over random tokens up to the last
hidden state: as it is, and as a CUDA graph, which does not wait for Python to start its kernels.
While a graph is recorded transformers cannot look at positions to see that there is one document
alone, and would make masks as for several; so the recorded models get no mask, or the compact one.
Contenders take turns, in a new order each round; medians. Layer times are the device's; model times
are the clock's, from an idle device to an idle device. Writes ``results/converted_prefill.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, block_sparse_attention
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.selection.threshold import ThresholdTable, calibrate_threshold

sys.path.insert(0, str(Path(__file__).parent))
from gpu_setups import Recorded, event_ms
from provenance import environment

OUT = Path(__file__).parent / "results" / "converted_prefill.json"
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 64
LENGTHS = [2**n for n in range(11, 18)]
SPARSITIES = (0.8, 0.9)
# The PyTorch path is too slow to repeat beyond.
LONGEST_EAGER = 16384
# Queries of a random model are made this much longer: logits of standard deviation 2.
SHARPER = 9.0


def config(sparsity: float) -> AdaptiveConfig:
    """The selector of the converted SmolLM2."""
    return AdaptiveConfig(
        scorer="low_rank", hidden_dim=32, query_stride=4, budget="threshold", block_size=BLOCK,
        num_sink_blocks=1, base_sparsity=sparsity,
    )  # fmt: skip


def layer_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(1, tokens, heads, head_dim)``; blocks have a part in common."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(count: int, heads: int) -> Tensor:
        return torch.randn(1, count, heads, HEAD_DIM, device="cuda", generator=generator)

    def mixed(heads: int) -> Tensor:
        shared = draw(tokens // BLOCK, heads).repeat_interleave(BLOCK, 1)
        return (draw(tokens, heads) + 1.5 * shared).bfloat16()

    return mixed(HEADS), mixed(KV_HEADS), draw(tokens, KV_HEADS).bfloat16()


def selection_inputs(layer: BlockSparseAdaptive, query: Tensor, key: Tensor) -> SelectionInputs:
    """What the layer chooses by in a causal forward pass."""
    mask = AttentionMask(query.shape[1], key.shape[1], causal=True)
    return layer._inputs(query, key, mask, None, True, None)


def converted_layer(query: Tensor, key: Tensor, sparsity: float) -> BlockSparseAdaptive:
    """A layer with maps fitted to these tokens and a threshold that meets the sparsity."""
    layer = BlockSparseAdaptive(
        num_heads=HEADS, head_dim=HEAD_DIM, num_kv_heads=KV_HEADS, adaptive_config=config(sparsity)
    )
    layer = layer.cuda().eval()
    q, k = query[0].double(), key[0].double()
    k = k - k.mean(0)
    moments = (torch.einsum("nhd,nhe->hde", x, x) / len(x) for x in (q, k))
    layer.scorer.fit(*moments)
    sample = layer.threshold_sample(selection_inputs(layer, query, key))
    found = calibrate_threshold([sample], sparsity)
    layer.set_thresholds(ThresholdTable((query.shape[1],), (found,)))
    return layer


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's attention as a model of transformers calls it."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def choose(layer: BlockSparseAdaptive, query: Tensor, key: Tensor, backend: str) -> BlockPattern:
    """The layer's selection alone, fused or in PyTorch."""
    layer.backend = backend
    try:
        return layer.select(selection_inputs(layer, query, key)).pattern
    finally:
        layer.backend = "auto"


def agreement(ours: BlockPattern, theirs: BlockPattern) -> dict[str, float]:
    """How many blocks of the other choice are in ours, and how many of ours in the other."""
    a, b = ours.to_dense(), theirs.to_dense()
    both = float((a & b).sum())
    return {"recall": both / float(b.sum()), "precision": both / float(a.sum())}


def take_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, measure: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    """Medians of all calls, in a new order each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for turn in range(rounds + 2):
        shuffle(order)
        for name in order:
            taken = measure(calls[name])
            if turn >= 2:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def layer_row(tokens: int, sparsity: float, rounds: int) -> dict[str, Any]:
    """One length and sparsity of the layer."""
    query, key, value = layer_inputs(tokens)
    layer = converted_layer(query, key, sparsity)
    pattern = choose(layer, query, key, "auto")
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(query, key, value),
        "converted": lambda: layer(query, key, value, is_causal=True),
        "selection": lambda: choose(layer, query, key, "auto"),
        "attention": lambda: block_sparse_attention(query, key, value, pattern, causal=True),
    }
    row: dict[str, Any] = {
        "tokens": tokens, "sparsity": sparsity, "measured_sparsity": float(pattern.sparsity.mean())
    }  # fmt: skip
    if tokens <= LONGEST_EAGER:
        calls["selection in PyTorch"] = lambda: choose(layer, query, key, "gather")
        row["agreement"] = agreement(pattern, choose(layer, query, key, "gather"))
    return row | {"ms": take_turns(calls, rounds, event_ms)}


def random_model() -> Any:
    """A Llama of SmolLM2-135M's shape with random weights."""
    from transformers import LlamaConfig, LlamaModel

    shape = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=max(LENGTHS), attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaModel(shape)
    for layer in model.layers:
        layer.self_attn.q_proj.weight.data.mul_(SHARPER)
    return model.bfloat16().eval()


def wall_ms(call: Callable[[], Any]) -> float:
    """Milliseconds by the clock, from an idle device to an idle device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def model_sparsity(adapted: Any, tokens: Tensor) -> float:
    """Mean over the layers of a forward pass."""
    from dilated_attention_pytorch.nn.block_sparse import observe_patterns

    found: list[Tensor] = []
    with observe_patterns(
        list(adapted.selectors.values()), lambda _, p: found.append(p.sparsity.mean())
    ):
        adapted.model(tokens, use_cache=False)
    return float(torch.stack(found).mean())


def as_graph(model: Any, ids: Tensor) -> Recorded:
    """The model's pass over these tokens as a CUDA graph, as one unpadded document.

    Raises:
        RuntimeError: If the pass cannot be captured.
        ValueError: If a replay gives something else than the model.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from dilated_attention_pytorch.hf.mask import plain_mask

    mask, before = None, model.config._attn_implementation
    if before == "sdpa":
        # The same under a name for which transformers makes no masks.
        AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
        model.config._attn_implementation = "sdpa_without_mask"
    else:
        # What adapted models make of such a document.
        mask = plain_mask(1, ids.shape[1], ids.device)

    def run() -> Tensor:
        states: Tensor = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states

    try:
        recorded, expected = Recorded(run), run()
    finally:
        model.config._attn_implementation = before
    if not torch.equal(recorded(), expected):
        raise ValueError("the graph computes something else")
    return recorded


def model_rows(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of the dense and of the converted models."""
    from dilated_attention_pytorch.hf.adapt import adapt
    from dilated_attention_pytorch.hf.calibration import calibrate

    model = random_model()
    converted = {s: adapt(copy.deepcopy(model), config(s)) for s in SPARSITIES}
    rows = []
    for length in lengths:
        tokens = torch.randint(49152, (length,), generator=torch.Generator().manual_seed(1))
        ids = tokens[None].cuda()
        row: dict[str, Any] = {"tokens": length, "measured_sparsity": {}, "tokens_per_second": {}}
        calls: dict[str, Callable[[], Any]] = {
            "dense": lambda ids=ids: model(ids, use_cache=False),
            "dense, cache": lambda ids=ids: model(ids, use_cache=True),
        }
        for sparsity, adapted in converted.items():
            calibrate(adapted, tokens, sparsity, lengths=[length], windows=1)
            name = f"converted {sparsity}"
            row["measured_sparsity"][name] = model_sparsity(adapted, ids)
            calls[name] = lambda m=adapted.model, ids=ids: m(ids, use_cache=False)
            calls[f"{name}, cache"] = lambda m=adapted.model, ids=ids: m(ids, use_cache=True)
        models = {"dense": model} | {f"converted {s}": a.model for s, a in converted.items()}
        for name, each in models.items():
            try:
                calls[f"{name}, graph"] = as_graph(each, ids)
            except RuntimeError as error:
                row.setdefault("refused", {})[f"{name}, graph"] = str(error)[:300]
        times = take_turns(calls, rounds if length <= 32768 else 2, wall_ms)
        row["tokens_per_second"] = {name: round(1000 * length / ms) for name, ms in times.items()}
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--no-model", action="store_true", help="the layer alone")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device.")
    began = time.perf_counter()
    record: dict[str, Any] = {
        "environment": environment("cuda"),
        "setup": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK},
        "layer": [],
    }
    with torch.no_grad():
        for tokens in arguments.lengths:
            for sparsity in SPARSITIES:
                row = layer_row(tokens, sparsity, arguments.rounds)
                print(row, flush=True)
                record["layer"].append(row)
        if not arguments.no_model:
            record["model"] = model_rows(arguments.lengths, arguments.rounds // 2)
    record["seconds"] = round(time.perf_counter() - began, 1)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['seconds']} s; wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
