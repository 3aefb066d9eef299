"""Time per generated token of an adapted Llama: dense, looking at the whole cache, incremental.

    python benchmarks/generation.py                  # CPU, float32, 2 threads
    python benchmarks/generation.py --device cuda    # one GPU, bfloat16, eager
    python benchmarks/generation.py --cache static   # room allotted at once
    python benchmarks/generation.py --selector low_rank   # as distill makes them

A model of the shape of SmolLM2-135M with random weights (what is chosen costs the same) continues
cached tokens greedily, a block of 64 tokens at a time, of which the first chooses where
``query_scope="past"``. "Whole cache" is what adapted layers do when no state can follow the cache:
a pass of the layer with ``query_offset``, which summarises all cached blocks for every token;
"each token" chooses anew at every token, with summaries that are kept. Every time covers the whole
model and transformers' cache: the dynamic one copies all its keys and values for each token, the
static one does not, but dense attention reads its mask too. Contenders share the weights and take
turns. ``--selector low_rank`` has the selectors of ``dilated-attention distill`` in place of
bilinear ones: they read the cached keys, with ``query_scope="past"`` once per block of tokens and
otherwise at every fourth; thresholds are calibrated on random tokens of the same length. The share
of the blocks that the newest tokens read is recorded. Writes
``results/generation_<device>_<cache>.json``, with the selector's name before ``.json`` if it is
another than bilinear.
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
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.train_selectors import distilled_config
from dilated_attention_pytorch.nn.block_sparse import observe_patterns

sys.path.insert(0, str(Path(__file__).parent))
from provenance import environment

RESULTS = Path(__file__).parent / "results"
BLOCK = 64
# Queries of a random model are made this much longer, so that attention is not uniform.
SHARPER = 9.0


def make_model(layers: int, tokens: int, device: str) -> Any:
    """SmolLM2-135M's shape; 30 layers are the whole of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=tokens + BLOCK, attn_implementation="sdpa",
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(SHARPER)
    return model


def twin(model: Any) -> Any:
    """A copy that shares the weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Contender:
    """A model with a cache of its own.

    ``sample``: tokens to calibrate thresholds on, where the budget has them.
    """

    def __init__(
        self, model: Any, cache: Any, config: AdaptiveConfig | None, whole: bool, sample: Tensor
    ) -> None:
        self.model, self.cache, self.whole = twin(model), copy.deepcopy(cache), whole
        self.selectors: list[Any] = []
        if config is not None:
            adapted = adapt(self.model, config)
            calibrate(adapted, sample, config.base_sparsity, lengths=[len(sample)], windows=1)
            self.selectors = list(adapted.selectors.values())
        self.times: list[float] = []
        self.read: float | None = None

    def density(self) -> float | None:
        """Share of the blocks so far that the newest tokens read; None where nothing follows."""
        shares = []
        for layer in self.cache.layers:
            followed = getattr(layer, "followed", None)
            if followed is not None and not self.whole:
                memory = followed.state.filled()
                blocks = -(-followed.state.num_tokens // BLOCK)
                shares.append(float(memory.counts.float().mean()) / blocks)
        return statistics.mean(shares) if shares else None

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
        self.read = self.density()
        if self.cache.is_croppable:
            self.cache.crop(-BLOCK)
        return taken

    def summary(self) -> dict[str, float | None]:
        """Median and quartiles in milliseconds, and what the newest tokens read."""
        low, middle, high = statistics.quantiles(self.times, n=4)
        return {"median": middle, "q1": low, "q3": high, "density": self.read}


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
    model: Any, tokens: int, batch: int, sparsity: float, rounds: int, static: bool, selector: str
) -> dict[str, Any]:
    """Times all contenders at one length."""
    cache = fill(model, tokens, batch, BLOCK * (rounds + 1) if static else None)

    sample = torch.randint(49152, (tokens,), generator=torch.Generator().manual_seed(1))

    def config(scope: str) -> AdaptiveConfig:
        if selector == "low_rank":
            return distilled_config(base_sparsity=sparsity, block_size=BLOCK, query_scope=scope)
        return AdaptiveConfig(
            base_sparsity=sparsity, block_size=BLOCK, budget="fixed", query_scope=scope,
            share_within_kv_group=True,
        )  # fmt: skip

    contenders = {
        "dense": Contender(model, cache, None, False, sample),
        "whole cache": Contender(model, cache, config("past"), True, sample),
        "incremental": Contender(model, cache, config("past"), False, sample),
        "incremental, each token": Contender(model, cache, config("block"), False, sample),
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
        read = "" if taken["density"] is None else f"   reads {taken['density']:.3f} of the blocks"
        print(f"  {name:24} {taken['median']:9.2f}{read}", flush=True)
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
    parser.add_argument("--selector", choices=("bilinear", "low_rank"), default="bilinear")
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
        "cache": arguments.cache, "rounds": arguments.rounds, "selector": arguments.selector,
    }  # fmt: skip
    ending = "" if arguments.selector == "bilinear" else f"_{arguments.selector}"
    name = f"generation_{arguments.device}_{arguments.cache}{ending}.json"
    out = arguments.out or RESULTS / name
    model = make_model(arguments.layers, max(arguments.tokens), arguments.device)
    for batch in arguments.batch:
        for tokens in arguments.tokens:
            row = measure(
                model, tokens, batch, arguments.sparsity, arguments.rounds,
                arguments.cache == "static", arguments.selector,
            )  # fmt: skip
            record["rows"].append(row)
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
