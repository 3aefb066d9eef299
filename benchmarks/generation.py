"""Time per generated token of an adapted Llama: dense, looking at the whole cache, incremental.

    python benchmarks/generation.py                  # CPU, float32, 2 threads
    python benchmarks/generation.py --device cuda    # one GPU, bfloat16, eager
    python benchmarks/generation.py --cache static   # room allotted at once

A model of the shape of SmolLM2-135M with random weights (what is chosen costs the same) continues
cached tokens greedily, a block of 64 tokens at a time, of which the first chooses where
``query_scope="past"``. "Whole cache" is what adapted layers do when no state can follow the cache:
a pass of the layer with ``query_offset``, which summarises all cached blocks for every token;
"each token" chooses anew at every token, with summaries that are kept. Every time covers the whole
model and transformers' cache: the dynamic one copies all its keys and values for each token, the
static one does not, but dense attention reads its mask too. Contenders share the weights and take
turns. Writes ``results/generation_<device>_<cache>.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.integrations.transformers import adapt
from dilated_attention_pytorch.nn.block_sparse import observe_patterns

sys.path.insert(0, str(Path(__file__).parent))
from provenance import environment

RESULTS = Path(__file__).parent / "results"
BLOCK = 64


def make_model(layers: int, tokens: int, device: str) -> Any:
    """SmolLM2-135M's shape; 30 layers are the whole of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=tokens + BLOCK, attn_implementation="sdpa",
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return LlamaForCausalLM(config).to(device, dtype).eval()


def twin(model: Any) -> Any:
    """A copy that shares the weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Contender:
    """A model with a cache of its own."""

    def __init__(self, model: Any, cache: Any, config: AdaptiveConfig | None, whole: bool) -> None:
        self.model, self.cache, self.whole = twin(model), copy.deepcopy(cache), whole
        self.selectors: list[Any] = []
        if config is not None:
            self.selectors = list(adapt(self.model, config).selectors.values())
        self.times: list[float] = []

    @contextmanager
    def path(self) -> Iterator[None]:
        """Layers that somebody observes run their forward pass."""
        with observe_patterns(self.selectors if self.whole else [], lambda *_: None):
            yield

    def block(self, token: Tensor) -> float:
        """Milliseconds per token of one block; a dynamic cache is cropped to where it was."""
        with self.path():
            _wait(token.device)
            begin = time.perf_counter()
            for _ in range(BLOCK):
                logits = self.model(token, past_key_values=self.cache).logits
                token = logits[:, -1:].argmax(-1)
            _wait(token.device)
            taken = 1000 * (time.perf_counter() - begin) / BLOCK
        if self.cache.is_croppable:
            self.cache.crop(-BLOCK)
        return taken

    def summary(self) -> dict[str, float]:
        """Median and quartiles in milliseconds."""
        low, middle, high = statistics.quantiles(self.times, n=4)
        return {"median": middle, "q1": low, "q3": high}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fill(model: Any, tokens: int, batch: int, room: int | None) -> Any:
    """A cache of random tokens, by dense attention a chunk at a time; static with ``room``."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(49152, (batch, tokens), generator=generator).to(model.device)
    if room is None:
        cache = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=tokens + room)
    for part in ids.split(512, 1):
        model.model(part, past_key_values=cache)
    return cache


@torch.no_grad()
def measure(
    model: Any, tokens: int, batch: int, sparsity: float, rounds: int, static: bool
) -> dict[str, Any]:
    """Times all contenders at one length."""
    cache = fill(model, tokens, batch, BLOCK * (rounds + 1) if static else None)

    def config(scope: str) -> AdaptiveConfig:
        return AdaptiveConfig(
            base_sparsity=sparsity, block_size=BLOCK, budget="fixed", query_scope=scope,
            share_within_kv_group=True,
        )  # fmt: skip

    contenders = {
        "dense": Contender(model, cache, None, False),
        "whole cache": Contender(model, cache, config("past"), True),
        "incremental": Contender(model, cache, config("past"), False),
        "incremental, each token": Contender(model, cache, config("block"), False),
    }
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    for contender in contenders.values():
        contender.block(token)
    for _ in range(rounds):
        for contender in contenders.values():
            contender.times.append(contender.block(token))
    results = {name: contender.summary() for name, contender in contenders.items()}
    print(f"{tokens} tokens x {batch}: milliseconds per token")
    for name, taken in results.items():
        print(f"  {name:24} {taken['median']:9.2f}", flush=True)
    return {"tokens": tokens, "batch": batch, "milliseconds": results}


def main() -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--threads", type=int, default=2, help="with --device cpu")
    parser.add_argument("--shared", action="store_true", help="record that others used the machine")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(arguments.device), "rows": []}
    record["environment"] |= {"transformers": transformers.__version__}
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
        record["environment"] |= {
            "threads": arguments.threads, "load_average": os.getloadavg()[0],
            "shared_machine": arguments.shared,
        }  # fmt: skip
    record["setup"] = {
        "layers": arguments.layers, "sparsity": arguments.sparsity, "block_size": BLOCK,
        "cache": arguments.cache, "rounds": arguments.rounds,
    }  # fmt: skip
    out = arguments.out or RESULTS / f"generation_{arguments.device}_{arguments.cache}.json"
    model = make_model(arguments.layers, max(arguments.tokens), arguments.device)
    for batch in arguments.batch:
        for tokens in arguments.tokens:
            row = measure(
                model, tokens, batch, arguments.sparsity, arguments.rounds,
                arguments.cache == "static",
            )  # fmt: skip
            record["rows"].append(row)
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
