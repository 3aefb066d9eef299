"""A sample gives the same alone, padded beside others, packed behind them and from a cache.

Cases are drawn at random from a seed. ``cd tests && python -m guards.alone_equals_together --cases
3000`` checks more of them than the suite does and names the seeds of those that fail.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.config import BUDGETS, SCORERS
from dilated_attention_pytorch.nn.baselines import (
    FIXED_PATTERNS,
    METHODS,
    BlockSparseFixed,
    BlockSparseTrainingFree,
    TrainingFreeConfig,
)
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.multihead import MultiheadAdaptiveAttention
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.selection.threshold import ThresholdTable
from guards.reports import write_report

SIZE, DIM, KV_HEADS = 8, 8, 2
LONGEST = 90
# Far from the numbers of real tokens, so that whoever reads padding shows.
GARBAGE = 1e3


def draw_config(rng: random.Random, **fixed: Any) -> AdaptiveConfig:
    """Settings that exclude each other are drawn again."""
    while True:
        scorer = rng.choice(SCORERS)
        values: dict[str, Any] = {
            "block_size": SIZE,
            "budget": rng.choice(BUDGETS),
            "scorer": scorer,
            "query_scope": rng.choice(["block", "past"]),
            "base_sparsity": rng.choice([0.0, 0.3, 0.6, 0.9]),
            "num_local_blocks": rng.choice([0, 0, 1, 2]),
            "num_sink_blocks": rng.choice([0, 0, 1, 2]),
            "pooling": rng.choice(
                [("mean", "max"), ("mean",), ("max", "min"), ("attention", "mean")]
            ),
            "estimator": rng.choice(["mass", "mass", "gumbel"]),
            "num_layers": rng.choice([1, 2]),
            "hidden_dim": 4,
            "query_stride": rng.choice([1, 2, 4]),
            "share_across_heads": rng.random() < 0.2,
            "share_within_kv_group": rng.random() < 0.2,
            "threshold_floor": rng.choice([0.0, 0.0, 0.5]),
            "hierarchy": rng.choice([(), (), (2,), (3, 2), (2, 2)]),
            "hierarchy_keep": rng.choice([1, 2]),
        }  # fmt: skip
        if (values["scorer"], values["budget"]) == ("low_rank", "threshold"):
            values["peak_share"] = rng.choice([0.0, 0.6])
        if values["budget"] == "fixed" and rng.random() < 0.4:
            values["num_selected_blocks"] = rng.choice([0, 1, 2])
        try:
            return AdaptiveConfig(**{**values, **fixed})
        except ValueError:
            continue


# Steep, so that another length is another choice.
TABLE = ThresholdTable((20, 60), (0.3, 0.08))


def scatter_weights(layer: Any, seed: int) -> None:
    """Weights and gains with which scores and budgets differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(layer.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        if hasattr(layer, "budget_offset"):
            layer.budget_offset.fill_(0.2)
            layer.budget_gain.copy_(1 + 0.2 * layer.budget_gain)


def draw_adaptive(rng: random.Random, **fixed: Any) -> BlockSparseAdaptive:
    """An adaptive layer, in float64: whoever chooses differently does so for a reason."""
    while True:
        config = draw_config(rng, **fixed)
        heads = KV_HEADS * rng.choice([1, 2])
        segments: Any = rng.choice([(None, None), (None, None), ([16, 48], [1, 2])])
        try:
            layer = BlockSparseAdaptive(*segments, heads, DIM, config, num_kv_heads=KV_HEADS)
        except ValueError:
            continue
        scatter_weights(layer, rng.randrange(1000))
        if config.budget == "threshold":
            layer.set_thresholds(TABLE)
        return layer.double().eval()


def draw_layer(rng: random.Random, size: int = SIZE) -> BlockSparseLayer:
    """A layer of any kind."""
    kind = rng.choice(["adaptive"] * 4 + ["training free", "fixed"])
    if kind == "adaptive":
        return draw_adaptive(rng, block_size=size)
    shared: Any = {
        "block_size": size, "base_sparsity": rng.choice([0.3, 0.6, 0.9]),
        "num_sink_blocks": rng.choice([0, 1]), "num_local_blocks": rng.choice([0, 1]),
    }  # fmt: skip
    if kind == "training free":
        method = rng.choice(METHODS)
        budget = "fixed" if method == "sink_window" else rng.choice(["fixed", "threshold"])
        floor = rng.choice([0.0, 0.5]) if budget == "threshold" else 0.0
        settings = TrainingFreeConfig(
            method=method, budget=budget, threshold_floor=floor, stride=rng.choice([2, 4]), **shared
        )
        layer = BlockSparseTrainingFree(settings, 4, DIM, num_kv_heads=KV_HEADS)
        if budget == "threshold":
            layer.set_thresholds(TABLE)
        return layer.eval()
    name = rng.choice(sorted(FIXED_PATTERNS))
    if name == "dense":
        shared["base_sparsity"] = 0
    segments = rng.choice([(None, None), ([16, 48], [1, 2])])
    return BlockSparseFixed(
        name, 4, DIM, num_kv_heads=KV_HEADS, segment_lengths=segments[0],
        dilation_rates=segments[1], **shared,
    ).eval()  # fmt: skip


def describe(layer: Any) -> str:
    """What was drawn, for the message of a failure."""
    return f"{layer} {getattr(layer, 'config', '')}"


class Samples:
    """Queries, keys and values of some samples of different lengths.

    Args:
        rng: Draws lengths and numbers.
        heads: Query heads.
        count: Samples.
        least: Tokens of each.
    """

    def __init__(self, rng: random.Random, heads: int, count: int = 3, least: int = 1) -> None:
        self.lengths = [rng.randint(least, LONGEST) for _ in range(count)]
        self.generator = torch.Generator().manual_seed(rng.randrange(10**6))
        self.heads = (heads, KV_HEADS, KV_HEADS)
        self.each = [[self.random(n, h) for h in self.heads] for n in self.lengths]
        for number, (_, key, _) in enumerate(self.each):
            # Repeated content in some, for budgets that go by it; a common direction in others.
            period = rng.choice([0, SIZE, 3 * SIZE])
            if period:
                # Nearly: of equal scores rounding would choose.
                repeated = key[:, torch.arange(key.shape[1]) % period]
                self.each[number][1] = repeated + 0.01 * key
            elif rng.random() < 0.5:
                key += 1

    def random(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, DIM, generator=self.generator, dtype=torch.float64)

    def garbage(self, batch: int, tokens: int, heads: int) -> Tensor:
        shape = (batch, tokens, heads, DIM)
        return GARBAGE * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def padded(self, room: int, starts: list[int] | None = None) -> list[Tensor]:
        """Padding holds garbage; sample b begins at ``starts[b]`` (0)."""
        out = [self.garbage(len(self.each), room, h) for h in self.heads]
        for number, parts in enumerate(self.each):
            first = 0 if starts is None else starts[number]
            for x, part in zip(out, parts, strict=True):
                x[number, first : first + part.shape[1]] = part[0]
        return out


def kept_of(pattern: Any, sample: int, rows: slice, columns: slice, batch: int) -> Tensor:
    """The tiles of a part of a sample's pattern; whatever lies beside that part is refused."""
    kept = pattern.to_dense()
    kept = kept.expand(batch, *kept.shape[1:])[sample, :, rows]
    beside = kept.clone()
    beside[..., columns] = False
    assert not beside.any(), "blocks of padding or of another document were chosen"
    return kept[..., columns]


def same(found: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(
        found, wanted, atol=1e-5, rtol=1e-5, msg=lambda text: f"{what}: {text}"
    )


def blocks(tokens: int) -> int:
    return -(-tokens // SIZE)


def check_padded(rng: random.Random) -> str:
    """Key lengths against each sample alone."""
    layer = draw_layer(rng)
    samples, causal = Samples(rng, layer.num_heads), rng.random() < 0.6
    room = max(samples.lengths) + rng.choice([0, 1, 20])
    lengths = torch.tensor(samples.lengths)
    out, info = layer(
        *samples.padded(room), is_causal=causal, key_lengths=lengths, return_pattern=True
    )
    for number, parts in enumerate(samples.each):
        alone, own = layer(*parts, is_causal=causal, return_pattern=True)
        part = slice(blocks(samples.lengths[number]))
        want = own["pattern"].to_dense()[0]
        assert torch.equal(kept_of(info["pattern"], number, part, part, len(out)), want), "pattern"
        same(out[number, : samples.lengths[number]], alone[0], "output")
        assert not out[number, samples.lengths[number] :].any(), "output of padding"
    return describe(layer)


def check_packed(rng: random.Random) -> str:
    """Documents in rows of different cuts against each of them alone."""
    layer = draw_layer(rng)
    samples, causal = Samples(rng, layer.num_heads, 4), rng.random() < 0.6
    rows = [[0, 1, 2], [3]]
    tail = rng.choice([0, 5])
    room = max(sum(samples.lengths[n] for n in row) for row in rows) + tail
    given = [samples.garbage(2, room, h) for h in samples.heads]
    edges = torch.zeros(2, 4, dtype=torch.long)
    for number, row in enumerate(rows):
        place = 0
        for slot, n in enumerate(row):
            for x, part in zip(given, samples.each[n], strict=True):
                x[number, place : place + samples.lengths[n]] = part[0]
            place += samples.lengths[n]
            edges[number, slot + 1 :] = place
    out, info = layer(*given, is_causal=causal, cu_seqlens=edges, return_pattern=True)
    for number, row in enumerate(rows):
        place = block = 0
        for n in row:
            length = samples.lengths[n]
            alone, own = layer(*samples.each[n], is_causal=causal, return_pattern=True)
            part = slice(block, block + blocks(length))
            want = own["pattern"].to_dense()[0]
            assert torch.equal(kept_of(info["pattern"], number, part, part, 2), want), "pattern"
            same(out[number, place : place + length], alone[0], "output")
            place, block = place + length, block + blocks(length)
    return describe(layer)


def check_other_queries(rng: random.Random) -> str:
    """Keys of different lengths, and queries of another sequence, padded too, or the newest."""
    layer = draw_layer(rng)
    cached = rng.random() < 0.5
    samples = Samples(rng, layer.num_heads, least=20)
    new = rng.randint(1, 20) if cached else rng.randint(1, 50)
    room = max(samples.lengths) + rng.choice([0, 1, 20])
    _, key, value = samples.padded(room)
    lengths = torch.tensor(samples.lengths)
    if not cached and rng.random() < 0.3:
        new = room
    query = samples.random(new * len(lengths), layer.num_heads).view(-1, new, layer.num_heads, DIM)
    options: dict[str, Any] = {"cross_attention": True}
    own_news = [new] * len(lengths)
    if cached:
        options = {"is_causal": True, "query_offset": lengths - new}
    elif rng.random() < 0.7:
        own_news = [rng.randint(1, new) for _ in lengths]
        options["query_lengths"] = torch.tensor(own_news)
        for number, own_new in enumerate(own_news):
            query[number, own_new:] = samples.garbage(1, new - own_new, layer.num_heads)[0]
    out, info = layer(query, key, value, key_lengths=lengths, return_pattern=True, **options)
    options.pop("query_lengths", None)
    for number, (_, k, v) in enumerate(samples.each):
        if cached:
            options["query_offset"] = samples.lengths[number] - new
        own_new = own_news[number]
        own_query = query[number : number + 1, :own_new]
        alone, own = layer(own_query, k, v, return_pattern=True, **options)
        rows, columns = slice(blocks(own_new)), slice(blocks(samples.lengths[number]))
        want = own["pattern"].to_dense()[0]
        found = kept_of(info["pattern"], number, rows, columns, len(out))
        assert torch.equal(found, want), "pattern"
        same(info["sparsity"][number], own["sparsity"][0], "sparsity")
        same(out[number, :own_new], alone[0], "output")
        assert not out[number, own_new:].any(), "output of padding"
    return f"{describe(layer)} {'cached' if cached else 'cross'}"


def check_decoding(rng: random.Random) -> str:
    """Prefill of uneven lengths, in a cache with padding on the left, and decoding behind it."""
    layer = draw_adaptive(rng, hierarchy=())
    new = rng.randint(1, 24)
    samples = Samples(rng, layer.num_heads, least=new)
    prompts = [n - new for n in samples.lengths]
    starts = [rng.randint(0, 9) for _ in prompts] if rng.random() < 0.5 else None
    cuts = sorted(rng.sample(range(1, new), min(rng.randint(0, 4), new - 1)))
    room = max(samples.lengths) + 9 + rng.choice([0, 13])
    fixed_room = room if rng.random() < 0.3 else None

    def run(
        prompt: list[Tensor], cache: list[Tensor], lengths: list[int], begin: list[int] | None
    ) -> list[Tensor]:
        state, places = SelectorState(fixed_room), torch.tensor(lengths)
        shift = None if begin is None else torch.tensor(begin)
        out = []
        if max(lengths):
            alone = len(lengths) == 1
            out.append(
                layer.prefill(
                    *prompt, state, key_lengths=None if alone else places,
                    starts=None if alone else shift,
                )
            )  # fmt: skip
        for first, last in zip([0, *cuts], [*cuts, new], strict=True):
            place = places[:, None] + torch.arange(first, last)
            if shift is not None:
                place = place + shift[:, None]
            query = cache[0][torch.arange(len(place))[:, None], place]
            if state.memory is None and shift is not None:
                state.starts = shift
            out.append(layer.decode(query, *cache[1:], state))
        return out

    cache = samples.padded(room, starts)
    prompt = [x[:, : max(prompts)] for x in samples.padded(room)]
    for number, length in enumerate(prompts):
        for x in prompt:
            x[number, length:] = GARBAGE
    together = run(prompt, cache, prompts, starts)
    for number, parts in enumerate(samples.each):
        own = [x[:, : prompts[number]] for x in parts]
        alone = run(own, parts, prompts[number : number + 1], None)
        if prompts[number]:
            same(together[0][number, : prompts[number]], alone[0][0], "prefill")
        first = 1 if max(prompts) else 0
        own_first = 1 if prompts[number] else 0
        for a, b in zip(together[first:], alone[own_first:], strict=True):
            same(a[number], b[0], "decode")
    return f"{describe(layer)} prompts {prompts} starts {starts} cuts {cuts} of {new}"


def check_multihead(rng: random.Random) -> str:
    """Padding anywhere, against the tokens that are none."""
    config = draw_config(rng)
    if config.budget == "threshold":
        config = draw_config(rng, budget="adaptive")
    layer = MultiheadAdaptiveAttention(16, 2, adaptive_config=config).double().eval()
    scatter_weights(layer, rng.randrange(1000))
    causal, room = rng.random() < 0.6, rng.randint(30, LONGEST)
    hidden = torch.tensor([[rng.random() < 0.4 for _ in range(room)] for _ in range(2)])
    hidden = torch.cat([hidden, torch.zeros(1, room, dtype=torch.bool)])
    hidden[:, rng.randrange(room)] = False
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    x = torch.randn(3, room, 16, generator=generator, dtype=torch.float64)
    given = torch.where(hidden[..., None], GARBAGE, x)
    out, _ = layer(given, given, given, key_padding_mask=hidden, is_causal=causal)
    for number in range(3):
        real = x[number : number + 1, ~hidden[number]]
        alone, _ = layer(real, real, real, is_causal=causal)
        same(out[number, ~hidden[number]], alone[0], "output")
    return str(config)


def check_cross_multihead(rng: random.Random) -> str:
    """Cross-attention with padding anywhere in queries and keys: outputs, choices and gradients."""
    # Nothing is drawn in training mode then.
    config = draw_config(rng, hard_sparsity=True)
    heads = rng.choice([2, 4])
    layer = MultiheadAdaptiveAttention(
        16, heads, num_kv_heads=2, adaptive_config=config, kdim=rng.choice([16, 12]), vdim=12,
        cross_attention=True, batch_first=rng.random() < 0.8,
    ).double().train(rng.random() < 0.6)  # fmt: skip
    scatter_weights(layer, rng.randrange(1000))
    if config.budget == "threshold":
        layer.attention.set_thresholds(TABLE)
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    q_room = rng.randint(1, LONGEST)
    # Lengths that are equal by chance look like one sequence.
    kv_room = rng.choice([q_room, rng.randint(1, LONGEST)])
    same_counts = q_room == kv_room and rng.random() < 0.5
    hidden_q, hidden_k = draw_hidden(rng, q_room), draw_hidden(rng, kv_room)
    if same_counts:
        hidden_k = hidden_q.flip(1)
    sizes = (q_room, 16), (kv_room, layer.kdim), (kv_room, 12)
    given = [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in sizes]
    upstream = torch.randn(3, q_room, 16, generator=generator, dtype=torch.float64)
    for x, hidden in zip((*given, upstream), (hidden_q, hidden_k, hidden_k, hidden_q), strict=True):
        x[hidden] = rng.choice([GARBAGE, torch.nan])

    def run(
        inputs: list[Tensor], upstream: Tensor, **masks: Tensor
    ) -> tuple[Tensor, dict[str, Any], list[Tensor], dict[str, Tensor]]:
        def turn(x: Tensor) -> Tensor:
            return x if layer.batch_first else x.transpose(0, 1)

        # A pass in training moves the budgets of the next one.
        layer.attention.budget_state.copy_(state)
        with torch.enable_grad():
            inputs = [x.clone().requires_grad_() for x in inputs]
            layer.zero_grad()
            out, info = layer(*(turn(x) for x in inputs), return_pattern=True, **masks)
            turn(out).backward(upstream)
        found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        return turn(out).detach(), info, [x.grad for x in inputs], found

    state = layer.attention.budget_state.clone()
    masks = {"key_padding_mask": hidden_k, "query_padding_mask": hidden_q}
    if not hidden_k.any():
        masks.pop("key_padding_mask")
    out, info, grads, weights = run(given, upstream, **masks)
    wanted = {name: torch.zeros_like(x) for name, x in weights.items()}
    all_rows = sum(blocks(int(n)) for n in (~hidden_q).sum(1))
    for number in range(3):
        real_q, real_k = ~hidden_q[number], ~hidden_k[number]
        one = slice(number, number + 1)
        inputs = [x[one, real] for x, real in zip(given, (real_q, real_k, real_k), strict=True)]
        rows, columns = (slice(blocks(int(real.sum()))) for real in (real_q, real_k))
        # The selector's own signal is a mean over the rows of the batch.
        weight = config.selector_weight * rows.stop / all_rows
        layer.attention.config = replace(config, selector_weight=weight)
        alone, own, own_grads, own_weights = run(inputs, upstream[one, real_q])
        want = own["pattern"].to_dense()[0]
        found = kept_of(info["pattern"], number, rows, columns, 3)
        assert torch.equal(found, want), "pattern"
        same(info["sparsity"][number], own["sparsity"][0], "sparsity")
        same(out[number, real_q], alone[0], "output")
        same(
            out[number, ~real_q], layer.out_proj.bias.detach().expand(int((~real_q).sum()), -1), ""
        )
        for x, real, own_x in zip(grads, (real_q, real_k, real_k), own_grads, strict=True):
            same(x[number, real], own_x[0], "gradient")
            assert not x[number, ~real].any(), "gradient of padding"
        for name, x in own_weights.items():
            wanted[name] += x
    for name, x in wanted.items():
        scale = 1 + float(x.abs().max())
        same(weights[name] / scale, x / scale, name)
    return f"{layer} {config}"


def draw_hidden(rng: random.Random, length: int) -> Tensor:
    """Which tokens of three samples are padding: at the end, in front, anywhere; never all."""
    hidden = torch.zeros(3, length, dtype=torch.bool)
    for row in hidden:
        kind, count = rng.choice(["end", "front", "anywhere", "none"]), rng.randrange(length)
        if kind == "end":
            row[length - count :] = True
        elif kind == "front":
            row[:count] = True
        elif kind == "anywhere":
            row[torch.tensor([rng.random() < 0.4 for _ in range(length)])] = True
        row[rng.randrange(length)] = False
    return hidden


def draw_adapted(rng: random.Random, model: Any) -> Any:
    """A tiny model with selectors of any kind in it, for ``with``."""
    from dilated_attention_pytorch.hf.adapt import adapt

    kind = rng.choice(["adaptive"] * 4 + ["training free"])
    config: Any = draw_config(rng)
    if kind == "training free":
        method = rng.choice(METHODS)
        budget = "fixed" if method == "sink_window" else rng.choice(["fixed", "threshold"])
        config = TrainingFreeConfig(
            method=method, budget=budget, block_size=SIZE, stride=4, base_sparsity=0.6
        )
    adapted = adapt(model, config)
    for number, selector in adapted.selectors.items():
        scatter_weights(selector, rng.randrange(1000) + number)
        if config.budget == "threshold":
            selector.set_thresholds(TABLE)
    model.double()
    return adapted


def draw_mask(rng: random.Random, length: int) -> Tensor:
    """Padding of three samples on the left, behind some prompt, anywhere, or none."""
    mask = torch.ones(3, length, dtype=torch.long)
    for row in mask:
        kind = rng.choice(["none", "left", "left", "behind", "anywhere"])
        first = rng.randrange(length - 1)
        if kind == "left":
            row[:first] = 0
        elif kind == "behind":
            row[first + 1 : first + 1 + rng.randint(1, 20)] = 0
        elif kind == "anywhere":
            row[torch.tensor([rng.random() < 0.3 for _ in range(length)])] = 0
    mask[:, -1] = 1
    return mask


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def check_model(rng: random.Random) -> str:
    """Logits of an adapted model: padded and packed against each sample alone."""
    from tiny_models import tiny_model, tokens

    model = tiny_model().double()
    with draw_adapted(rng, model) as adapted:
        layer = adapted.selectors[0]
        length = rng.randint(20, LONGEST)
        ids, mask = tokens(3, length, seed=rng.randrange(1000)), draw_mask(rng, length)
        cached = rng.random() < 0.5
        out = model(ids, attention_mask=mask, position_ids=places(mask), use_cache=cached).logits
        alone = [
            model(ids[n : n + 1, mask[n].bool()], use_cache=cached).logits[0] for n in range(3)
        ]
        for n in range(3):
            same(out[n, mask[n].bool()], alone[n], "padded")
        # The first two in one row; the third begins another, whose rest is one more document.
        first = [ids[n, mask[n].bool()] for n in range(3)]
        rest = tokens(1, 4 * length, seed=1)[0]
        room = max(len(first[0]) + len(first[1]), len(first[2])) + rng.choice([0, 5])
        rows = [[first[0], first[1], rest], [first[2], rest]]
        row_ids = [torch.cat(row)[:room] for row in rows]
        positions = [torch.cat([torch.arange(len(x)) for x in row])[:room] for row in rows]
        out = model(
            torch.stack(row_ids), position_ids=torch.stack(positions), use_cache=False
        ).logits
        edge = len(first[0])
        found = [out[0, :edge], out[0, edge : edge + len(first[1])], out[1, : len(first[2])]]
        for a, b in zip(found, alone, strict=True):
            same(a, b, "packed")
    return describe(layer)


def run_cached(
    model: Any, ids: Tensor, masks: list[Tensor], cuts: list[int], crops: list[int]
) -> list[Tensor]:
    """Logits of each step; the newest places of some steps are dropped and come again."""
    from transformers import DynamicCache

    cache, out, done = DynamicCache(config=model.config), [], 0
    for mask, last, crop in zip(masks, cuts, crops, strict=True):
        first = max(done - crop, 0) if done else 0
        if first < done:
            cache.crop(first - done)
        out.append(
            model(
                ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache,
                position_ids=places(mask)[:, first:last],
            ).logits
        )  # fmt: skip
        done = last
    return out


def check_cached_model(rng: random.Random) -> str:
    """Steps over a cache: of a batch, of each sample by itself, and of it without padding."""
    from tiny_models import tiny_model, tokens

    model = tiny_model().double()
    with draw_adapted(rng, model) as adapted:
        layer = adapted.selectors[0]
        length = rng.randint(20, LONGEST)
        ids, mask = tokens(3, length, seed=rng.randrange(1000)), draw_mask(rng, length)
        steps = rng.randint(1, 6)
        cuts = [*sorted(rng.sample(range(1, length), steps)), length]
        if rng.random() < 0.5:
            cuts = [*cuts[:-1], *range(cuts[-2] + 1, length + 1)]
        crops = [rng.randint(1, 9) if rng.random() < 0.15 else 0 for _ in cuts]
        masks = [mask] * len(cuts)
        edited = rng.random() < 0.2
        if edited:
            other, step = mask.clone(), rng.randrange(len(cuts))
            other[rng.randrange(3), rng.randrange(length - 1)] ^= 1
            masks = [*masks[:step], *[other] * (len(cuts) - step)]
        together = run_cached(model, ids, masks, cuts, crops)
        for n in range(3):
            one = slice(n, n + 1)
            alone = run_cached(model, ids[one], [m[one] for m in masks], cuts, crops)
            done = 0
            for a, b, m, last, crop in zip(together, alone, masks, cuts, crops, strict=True):
                first = max(done - crop, 0) if done else 0
                real = m[n, first:last].bool()
                same(a[n, real], b[0, real], f"sample {n} in the step to {last}")
                done = last
        if not edited and not any(crops):
            for n in range(3):
                check_without_padding(model, ids[n], mask[n].bool(), cuts, together, n)
        # A scorer that goes by summaries lets the threshold's softmax see the row's own block.
        config = layer.config
        strict = isinstance(config, AdaptiveConfig) and config.query_scope == "past"
        if strict and (config.budget != "threshold" or config.scorer == "low_rank"):
            # More than a block of dropped tokens is forgotten.
            strict = not (edited or config.hierarchy) and sum(crops) <= SIZE
            for n in range(3) if strict else ():
                real = mask[n].bool()
                whole = model(ids[n : n + 1, real], use_cache=False).logits[0]
                done, seen = 0, torch.zeros(length, dtype=torch.long)
                seen[real] = torch.arange(int(real.sum()))
                for out, last, crop in zip(together, cuts, crops, strict=True):
                    first = max(done - crop, 0) if done else 0
                    part = real[first:last]
                    same(out[n, part], whole[seen[first:last][part]], f"sample {n} uncached")
                    done = last
    return describe(layer)


def check_without_padding(
    model: Any, ids: Tensor, real: Tensor, cuts: list[int], together: list[Tensor], n: int
) -> None:
    """Sample n of steps over a cache against its tokens alone, in steps of the same tokens."""
    own_ids, own_cuts = ids[real][None], [int(real[:last].sum()) for last in cuts]
    steps = sorted(set(own_cuts) - {0})
    masks = [torch.ones_like(own_ids)] * len(steps)
    alone = dict(
        zip(steps, run_cached(model, own_ids, masks, steps, [0] * len(steps)), strict=True)
    )
    for out, last, own_last, first in zip(together, cuts, own_cuts, [0, *cuts], strict=False):
        part = real[first:last]
        if part.any():
            same(out[n, part], alone[own_last][0], f"sample {n} without padding")


def check_kernels(rng: random.Random) -> str:
    """The fused selection of packed and padded samples is that of PyTorch."""
    while True:
        # The smallest blocks that kernels take.
        layer = draw_layer(rng, 16)
        if getattr(getattr(layer, "config", None), "estimator", "mass") == "mass":
            break
    layer.float()
    samples, causal = Samples(rng, layer.num_heads, 2), rng.random() < 0.6
    given = [x.float() for x in samples.padded(max(samples.lengths))]
    options: dict[str, Any] = {"key_lengths": torch.tensor(samples.lengths)}
    if rng.random() < 0.5:
        given = [torch.cat([parts[n] for parts in samples.each], 1).float() for n in range(3)]
        options = {"cu_seqlens": torch.tensor([0, *samples.lengths]).cumsum(0)}
    kept = []
    for backend in ("gather", "triton"):
        layer.backend = backend
        _, info = layer(*given, is_causal=causal, return_pattern=True, **options)
        kept.append(info["pattern"].to_dense())
    assert torch.equal(*torch.broadcast_tensors(*kept)), "pattern"
    return describe(layer)


CHECKS: list[Callable[[random.Random], str]] = [
    check_padded, check_packed, check_other_queries, check_decoding, check_multihead,
    check_cross_multihead,
]  # fmt: skip
# They need triton, and take long where it is interpreted.
KERNEL_CHECKS: list[Callable[[random.Random], str]] = [check_kernels]
# They need transformers.
MODEL_CHECKS: list[Callable[[random.Random], str]] = [check_model, check_cached_model]


def failures(
    check: Callable[[random.Random], str], seeds: range
) -> Iterator[tuple[int, BaseException]]:
    """The seeds at which a check fails."""
    for seed in seeds:
        try:
            with torch.no_grad():
                check(random.Random(seed))
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            yield seed, error


def main() -> int:
    """Runs many cases; prints the seeds that fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of each check")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--only", default="", help="part of the names of checks")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        # Read when the kernels are imported, at their first use.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    total, parts = 0, {}
    for check in [*CHECKS, *MODEL_CHECKS, *KERNEL_CHECKS]:
        if options.only not in check.__name__:
            continue
        found = list(failures(check, range(options.first, options.first + options.cases)))
        total += len(found)
        parts[check.__name__] = [seed for seed, _ in found]
        print(f"{check.__name__}: {len(found)} of {options.cases} fail")
        for seed, error in found[:10]:
            frame = error.__traceback__.tb_next.tb_frame
            layer = describe(frame.f_locals.get("layer"))
            print(f"  seed {seed}: {str(error)[:100]!r} {layer[:1500]}")
        if found:
            traceback.print_exception(found[0][1])
    write_report(options.json, options.cases * len(parts), total, failing_seeds=parts)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
