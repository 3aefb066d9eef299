"""Random calls of what stands around the attention op: decode, layers, multihead and patterns."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockPattern,
    BlockSparseAdaptive,
    BlockSparseFixed,
    MultiheadAdaptiveAttention,
    block_sparse_decode,
)
from dilated_attention_pytorch.nn.baselines import BlockSparseTrainingFree, TrainingFreeConfig
from guards import draws, oracle, rounding
from guards.attention_calls import Outcome, difference
from guards.draws import DTYPES, PLANTS, Coin, Dice, draw_pattern, draw_rule, lay_out


def limits_of(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, p: Tensor, dtype: torch.dtype, scale: float,
    grad: Tensor, bias: Tensor | None = None, rows: Tensor | None = None,
) -> rounding.Bounds:  # fmt: skip
    """Bounds of a call; without rows and bias, of its tokens alone."""
    shape = (len(q), 1, 1, 1)
    if bias is None or rows is None:
        rows, at = torch.zeros(q.shape[1], dtype=torch.long), torch.where(slots >= 0, 0, -1)
    else:
        at, shape = slots, tuple(bias.shape)
    return rounding.bounds(
        rounding.Call(q, k, v, at, rows, shape, scale, bias, p, grad, None), dtype
    )


def check_decode(seed: int, device: str, backends: tuple[str, ...]) -> list[Outcome]:
    """A step of decoding over a cache of any layout."""
    dice = Dice(seed, draws.GPU_FORMS if device == "cuda" else 0)
    dtype = dice.form("dtype").choice(DTYPES)
    of_size = dice.form("size")
    size = of_size.choice((16, 32) if "triton" in backends else (1, 2, 4, 7, 16, 32))
    b, n = dice.choice((0, 1, 2, 3)), dice.form("queries").choice((1, 1, 1, 2, 3, 5))
    g = dice.form("kv heads").choice((1, 2))
    d = dice.form("head_dim").choice((1, 4, 8, 16, 17, 32))
    h = g * dice.form("group").choice((1, 2, 4))
    m = dice.length(size, 80)
    starts = [dice.randint(0, m) if dice.chance(0.7) else 0 for _ in range(b)]
    lengths = [dice.choice((0, m - s, dice.randint(0, m - s))) for s in starts]
    given = {
        name: torch.tensor(values, dtype=dice.form(name).choice((torch.int32, torch.int64)))
        for name, values in (("starts", starts), ("lengths", lengths))
    }
    if dice.form("no starts").chance(0.3):
        starts, given["starts"] = [0] * b, None
        if dice.form("no lengths").chance(0.3):
            lengths, given["lengths"] = [m] * b, None
    j, lists = -(-m // size), dice.form("lists").choice((1, g, h))
    shared = dice.form("shared").chance(0.4)
    kept = dice.flags(dice.choice((0.0, 0.3, 0.7, 1.0)), b, lists, 1 if shared else n, j)
    counts = kept.sum(-1).int()
    width = (int(counts.max()) if counts.numel() else 0) + dice.choice((0, 0, 2))
    low, high = dice.choice(((0, 1), (-1, 0), (-(2**31), 2**31 - 1)))
    indices = torch.randint(
        low, high, (*counts.shape, width), generator=dice.tensors, dtype=torch.int32
    )
    for row in np.ndindex(*counts.shape):
        indices[row][: counts[row]] = kept[row].nonzero().squeeze(-1).int()
    allowed, columns = np.zeros((b, n, m), dtype=bool), np.zeros((b, m), dtype=np.int64)
    for sample in range(b):
        token = np.arange(m) - starts[sample]
        columns[sample] = np.maximum(token, 0) // size
        for query in range(n):
            sees = lengths[sample] - n + query + 1
            allowed[sample, query] = (token >= 0) & (token < sees)
    rows = np.zeros(n, dtype=np.int64) if shared else np.arange(n)
    slots = oracle.seen_slots(
        counts.numpy(), indices.numpy(), j, allowed, h, (np.tile(rows, (max(b, 1), 1))[:b], columns)
    )
    q, k, v = dice.randn(b, n, h, d), dice.randn(b, m, g, d), dice.randn(b, m, g, d)
    q *= dice.choice((1, 1, 10))
    used = (slots >= 0).view(b, g, h // g, n, m).any((2, 3)).transpose(1, 2)
    if dice.chance(0.6):
        k[~used], v[~used] = dice.choice(PLANTS), dice.choice(PLANTS)
    if m and dice.chance(0.1):
        dice.choice((k, v))[:, dice.randint(0, m - 1)] = dice.choice(PLANTS)
    q, k, v = (lay_out(dice, x.to(dtype), y) for x, y in zip((q, k, v), "qkv", strict=True))
    bias = None
    if dice.form("bias").chance(0.3):
        wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        bias = dice.randn(*indices.shape).to(wide_dtype)
        bias[dice.flags(0.2, *bias.shape)] = -torch.inf
        bias[torch.arange(width) >= counts[..., None]] = dice.choice((0.0, *PLANTS))
    scale = dice.choice((None, None, 0.0, -0.4, 2.0))
    wide = [x.double() for x in (q, k, v)]
    of_rows, wide_bias = torch.from_numpy(rows), None if bias is None else bias.double()
    out, lse, p = oracle.attention(*wide, slots, scale=scale, bias=wide_bias, rows=of_rows)
    factor = d**-0.5 if scale is None else scale
    limits = limits_of(
        *wide, slots, p, dtype, factor, torch.zeros_like(out), wide_bias, of_rows
    )  # fmt: skip
    outcomes = []
    for backend in backends:
        moved = [x.to(device) for x in (q, k, v, counts, indices)] if device != "cpu" else [
            q, k, v, counts, indices
        ]  # fmt: skip
        options = {x: None if t is None else t.to(device) for x, t in given.items()}
        try:
            got, got_lse = block_sparse_decode(
                *moved, block_size=size, scale=scale, backend=backend, return_lse=True,
                block_bias=None if bias is None else bias.to(device), **options,
            )  # fmt: skip
        except ValueError as error:
            if backend == "triton" and "cannot run this" in str(error):
                outcomes.append(Outcome("decode", backend, "", "decode"))
            else:
                outcomes.append(Outcome("decode", backend, f"ValueError: {error}"))
            continue
        except Exception as error:
            outcomes.append(Outcome("decode", backend, f"{type(error).__name__}: {error}"))
            continue
        wrong = [
            difference(name, x, want, limits[name])
            for name, x, want in (("out", got, out), ("lse", got_lse, lse))
        ]
        outcomes.append(Outcome("decode", backend, "; ".join(x for x in wrong if x)))
    return outcomes


def layer_options(dice: Dice, b: int, n: int, m: int, size: int) -> dict[str, Any]:
    """Keyword arguments of a layer: like the op's, and ``cross_attention``."""
    rule = draw_rule(dice, b, n, m, (size, size))
    rule["is_causal"] = rule.pop("causal")
    offset = rule.get("query_offset")
    if offset is not None and not isinstance(offset, Tensor) and abs(offset) > 2**31:
        rule["query_offset"] = 0
    if isinstance(offset, Tensor):
        rule["query_offset"] = offset.clamp(-(m + n), m + n)
    plain = not rule["is_causal"] and "query_offset" not in rule and "cu_seqlens" not in rule
    if plain and dice.chance(0.3):
        rule["cross_attention"] = True
    return rule


def aligned_blocks(cu_seqlens: Tensor, b: int, n: int, size: int) -> np.ndarray:
    """Block of each packed token where every document starts a new one."""
    blocks = np.zeros((b, n), dtype=np.int64)
    for sample in range(b):
        edges = (cu_seqlens if cu_seqlens.dim() == 1 else cu_seqlens[sample]).tolist()
        first = 0
        for start, end in pairwise(edges):
            blocks[sample, start:end] = first + np.arange(end - start) // size
            first += -(-(end - start) // size)
    return blocks


def make_layer(dice: Coin, h: int, g: int, d: int, size: int) -> torch.nn.Module:
    """A layer of some kind with settings of some kind."""
    kind = dice.choice(("adaptive", "adaptive", "adaptive", "fixed", "training free"))
    common = {"base_sparsity": dice.choice((0.0, 0.3, 0.5, 0.9)), "block_size": size}
    forced = {"num_local_blocks": dice.randint(0, 2), "num_sink_blocks": dice.randint(0, 2)}
    segments = ([2 * size, 5 * size], [1, 2]) if dice.chance(0.2) else (None, None)
    if kind == "fixed":
        name = dice.choice(("local", "dilated", "strided", "hierarchical", "sink_local", "random"))
        return BlockSparseFixed(
            name, h, d, num_kv_heads=g, **common, **forced,
            segment_lengths=segments[0], dilation_rates=segments[1],
        )  # fmt: skip
    if kind == "training free":
        method = dice.choice(("sink_window", "mean_pool", "antidiagonal", "min_max", "oracle"))
        return BlockSparseTrainingFree(
            TrainingFreeConfig(method=method, stride=dice.choice((1, 2)), **common),
            h,
            d,
            num_kv_heads=g,
        )
    config = dict(
        **common, **forced, hidden_dim=4, num_explore_blocks=dice.randint(0, 2),
        budget=dice.choice(("adaptive", "fixed")),
        scorer=dice.choice(("bilinear", "mlp", "low_rank")),
        query_scope=dice.choice(("block", "past")),
        estimator=dice.choice(("mass", "straight_through")),
    )  # fmt: skip
    if config["scorer"] == "low_rank":
        config["query_stride"], config["hidden_dim"] = 1, min(4, d)
    if config["scorer"] != "low_rank" and segments[0] is None and dice.chance(0.2):
        config["hierarchy"], config["estimator"] = (2,), "mass"
    share = dice.choice(("", "", "share_across_heads", "share_within_kv_group"))
    if share:
        config[share] = True
    return BlockSparseAdaptive(*segments, h, d, AdaptiveConfig(**config), num_kv_heads=g)


def check_layer(seed: int, device: str) -> list[Outcome]:
    """A layer's output is attention over the pattern that it returns; its sparsity is counted."""
    dice = Dice(seed, draws.GPU_FORMS if device == "cuda" else 0)
    torch.manual_seed(seed)
    size = dice.form("size").choice((2, 4, 8, 16))
    b, g = dice.choice((1, 2, 2)), dice.form("kv heads").choice((1, 2))
    d, h = dice.form("head_dim").choice((4, 8, 16)), g * dice.form("group").choice((1, 2))
    n = max(dice.length(size, 60), 1)
    m = n if dice.chance(0.6) else max(dice.length(size, 60), 1)
    options = layer_options(dice, b, n, m, size)
    layer = make_layer(dice.form("layer"), h, g, d, size).train(dice.form("training").chance(0.5))
    kind = type(layer).__name__
    cross = options.get("cross_attention", False)
    one_sequence = n == m and not cross
    rule = {x: y for x, y in options.items() if x not in ("is_causal", "cross_attention")}
    allowed = oracle.token_rule(b, n, m, causal=options["is_causal"], **rule)
    q, k, v = dice.randn(b, n, h, d), dice.randn(b, m, g, d), dice.randn(b, m, g, d)
    real = np.ones((b, n), dtype=bool)
    if rule.get("key_lengths") is not None:
        real_keys = np.arange(m) < rule["key_lengths"].numpy()[:, None]
        if one_sequence:
            real = real_keys
        if dice.chance(0.5):
            plant = dice.choice(PLANTS)
            k[torch.from_numpy(~real_keys)], v[torch.from_numpy(~real_keys)] = plant, plant
            q[torch.from_numpy(~real)] = plant
    if rule.get("cu_seqlens") is not None:
        inside = aligned_inside(rule["cu_seqlens"], b, n)
        if dice.chance(0.5):
            for x in (q, k, v):
                x[torch.from_numpy(~inside)] = dice.choice(PLANTS)
    q, k, v = (x.float().to(device) for x in (q, k, v))
    moved = {x: y.to(device) if isinstance(y, Tensor) else y for x, y in options.items()}
    # While training the selector has part in the gradients of queries and keys.
    inputs = {"value": v} if layer.training else {"query": q, "key": k, "value": v}
    for x in inputs.values():
        x.requires_grad_()
    try:
        out, info = layer.to(device)(q, k, v, return_pattern=True, **moved)
        grad = dice.randn(b, n, h, d).float()
        found = torch.autograd.grad(out, list(inputs.values()), grad.to(device))
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
        return [Outcome(kind, "auto", f"{wrong} {describe(layer, options)}")]
    pattern = info["pattern"].to("cpu")
    if rule.get("cu_seqlens") is not None:
        blocks = aligned_blocks(rule["cu_seqlens"], b, n, size)
        places = (blocks, blocks)
    else:
        places = (np.arange(n)[None] // size, np.arange(m)[None] // size)
    counts, indices = pattern.kv_num_blocks.numpy(), pattern.kv_indices.numpy()
    columns = max(pattern.num_key_blocks, int(places[1].max()) + 1)
    slots = oracle.seen_slots(counts, indices, columns, allowed & real[..., None], h, places)
    wide = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    want, _, p = oracle.attention(*wide, slots)
    of = dict(zip(("query", "key", "value"), wide, strict=True))
    wanted = torch.autograd.grad(want, [of[name] for name in inputs], grad.double())
    limits = limits_of(
        *(x.detach() for x in wide), slots, p.detach(), torch.float32, d**-0.5, grad.double()
    )
    wrong = [
        difference("out", out, want.detach(), limits["out"]),
        *(
            difference(name, x, y, limits[name])
            for name, x, y in zip(inputs, found, wanted, strict=True)
        ),
        count_tiles(info, counts, indices, allowed & real[..., None], places, b, h, columns),
    ]
    text = "; ".join(x for x in wrong if x)
    return [Outcome(kind, "auto", f"{text} {describe(layer, options)}" if text else "")]


def aligned_inside(cu_seqlens: Tensor, b: int, n: int) -> np.ndarray:
    """Which tokens belong to a document."""
    last = cu_seqlens[-1:] if cu_seqlens.dim() == 1 else cu_seqlens[:, -1]
    return np.broadcast_to(np.arange(n) < last.numpy()[:, None], (b, n))


def describe(layer: torch.nn.Module, options: dict[str, Any]) -> str:
    """What was called, for reading."""
    return f"| {layer} {getattr(layer, 'config', '')} training={layer.training} {options}"


def count_tiles(
    info: dict[str, Any], counts: np.ndarray, indices: np.ndarray, allowed: np.ndarray,
    places: tuple[np.ndarray, np.ndarray], b: int, h: int, columns: int,
) -> str:  # fmt: skip
    """Whether kept tiles are allowed ones and the sparsity reported is that of the pattern."""
    blocks = np.zeros((b, counts.shape[2], columns), dtype=bool)
    for sample in range(b):
        rows, cols = places[0][sample % len(places[0])], places[1][sample % len(places[1])]
        at = np.nonzero(allowed[sample])
        blocks[sample, rows[at[0]], cols[at[1]]] = True
    dense = blocks.sum((1, 2))
    reported = info["sparsity"].double().cpu().numpy()
    for sample in range(b):
        for head in range(h):
            mine = (sample % len(counts), head // (h // counts.shape[1]))
            kept = 0
            for row in range(counts.shape[2]):
                listed = indices[mine][row][: counts[mine][row]]
                kept += len(listed)
                if list(listed) != sorted(set(listed)):
                    return f"row {row} lists {list(listed)}"
                if not blocks[sample, row, listed].all():
                    return f"sample {sample} row {row} keeps a tile that nobody may see"
            want = 1 - kept / max(dense[sample], 1)
            if abs(reported[sample, head] - want) > 1e-9:
                return f"sparsity[{sample}, {head}] is {reported[sample, head]}, not {want}"
    return ""


def check_multihead(seed: int, device: str) -> list[Outcome]:
    """Padding anywhere, projections included, against the formula on the returned pattern."""
    dice = Dice(seed)
    torch.manual_seed(seed)
    size, heads, d = dice.choice((2, 4, 8)), dice.choice((1, 2, 4)), dice.choice((4, 8))
    kv_heads = dice.choice([x for x in (1, 2, 4) if heads % x == 0])
    e, b = heads * d, dice.choice((1, 2, 3))
    n = max(dice.length(size, 30), 1)
    cross = dice.chance(0.3)
    m = max(dice.length(size, 30), 1) if cross else n
    causal = dice.chance(0.5) and not cross
    layer = MultiheadAdaptiveAttention(
        e, heads, bias=dice.chance(0.7), num_kv_heads=kv_heads,
        adaptive_config=AdaptiveConfig(
            block_size=size, base_sparsity=dice.choice((0.0, 0.5, 0.9)), hidden_dim=4,
            budget=dice.choice(("fixed", "adaptive")), num_explore_blocks=dice.randint(0, 1),
        ),
    ).train(dice.chance(0.5)).to(device)  # fmt: skip
    for parameter in layer.parameters():
        if parameter.dim() == 1 and parameter.numel() >= e:
            torch.nn.init.normal_(parameter)
    x = dice.randn(b, n, e).float()
    source = dice.randn(b, m, e).float() if cross else x
    hidden = dice.flags(dice.choice((0.0, 0.3, 0.7, 1.0)), b, m) if dice.chance(0.7) else None
    if hidden is not None and dice.chance(0.5):
        source[hidden] = dice.choice((float("nan"), float("inf")))
    floating = hidden is not None and dice.chance(0.3)
    mask = torch.zeros(b, m).masked_fill(hidden, -torch.inf) if floating else hidden
    try:
        given, given_keys = x.to(device), source.to(device)
        given_keys = given_keys if cross else given
        out, info = layer(
            given, given_keys, given_keys, is_causal=causal, return_pattern=True,
            key_padding_mask=None if mask is None else mask.to(device),
        )  # fmt: skip
    except Exception as error:
        return [Outcome("multihead", "auto", f"{type(error).__name__}: {error}")]
    real = np.ones((b, m), dtype=bool) if hidden is None else ~hidden.numpy()
    places = np.where(real, real.cumsum(1) - 1, 0)
    allowed = np.broadcast_to(real[:, None], (b, n, m)).copy()
    query_places = np.arange(n)[None]
    if not cross:
        allowed &= real[:, :, None]
        query_places = places
    if causal:
        allowed &= np.tril(np.ones((n, m), dtype=bool))
    pattern, layer = info["pattern"].to("cpu"), layer.cpu()
    slots = oracle.seen_slots(
        pattern.kv_num_blocks.numpy(), pattern.kv_indices.numpy(), pattern.num_key_blocks, allowed,
        heads, (query_places // size, places // size),
    )  # fmt: skip
    if hasattr(layer, "in_proj_weight"):
        weights = layer.in_proj_weight.double().split(layer._sizes)
    else:
        weights = [
            w.double() for w in (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        ]
    biases = [0.0] * 3
    if layer.in_proj_bias is not None:
        biases = list(layer.in_proj_bias.double().split(layer._sizes))
    q, k, v = (
        (y.double() @ w.mT + bias).unflatten(-1, (-1, d))
        for y, w, bias in zip((x, source, source), weights, biases, strict=True)
    )
    want, _, _ = oracle.attention(q, k, v, slots)
    want = want.flatten(2) @ layer.out_proj.weight.double().mT
    if layer.out_proj.bias is not None:
        want = want + layer.out_proj.bias.double()
    limit = torch.full_like(want, 1e-4) + 1e-4 * want.detach().abs()
    wrong = difference("out", out, want.detach(), limit)
    padding = None if hidden is None else hidden.int().tolist()
    about = f"| n={n} m={m} cross={cross} causal={causal} hidden={padding} {layer}"
    return [Outcome("multihead", "auto", f"{wrong} {about}" if wrong else "")]


def check_pattern(seed: int, device: str) -> list[Outcome]:
    """Conversions of a pattern there and back, and its transpose."""
    dice = Dice(seed)
    sizes = (dice.choice((1, 3, 16)), dice.choice((1, 4, 16)))
    b, g = dice.choice((0, 1, 2)), dice.choice((1, 2))
    h = g * dice.choice((1, 2))
    n, m = dice.length(sizes[0], 40), dice.length(sizes[1], 40)
    pattern, _ = draw_pattern(dice, b, n, m, g, h, sizes)
    pattern = pattern.to(device)
    counts, indices = pattern.kv_num_blocks.cpu().numpy(), pattern.kv_indices.cpu().numpy()
    want = np.zeros((*counts.shape, -(-m // sizes[1])), dtype=bool)
    slots: dict[tuple[int, ...], list[int]] = {}
    for row in np.ndindex(*counts.shape):
        listed = indices[row][: counts[row]]
        want[row][listed] = True
        for slot, j in enumerate(listed):
            slots.setdefault((*row[:2], int(j)), []).append(row[2] * indices.shape[3] + slot)
    wrong = []

    def compare(name: str, got: Tensor, wanted: np.ndarray) -> None:
        if not np.array_equal(got.cpu().numpy(), wanted):
            wrong.append(name)

    try:
        compare("to_dense", pattern.to_dense(), want)
        again = BlockPattern.from_dense(pattern.to_dense(), q_len=n, kv_len=m, block_size=sizes)
        again.validate()
        compare("from_dense", again.to_dense(), want)
        transposed = pattern.transpose()
        offsets, entries = transposed.offsets.cpu().numpy(), transposed.slots.cpu().numpy()
        for place in np.ndindex(*want.shape[:2], want.shape[3]):
            sample, head, j = place
            at = offsets[sample, head]
            if list(entries[sample, head][at[j] : at[j + 1]]) != slots.get(place, []):
                wrong.append(f"transpose of {place}")
        for head in range(pattern.num_heads):
            compare(f"head({head})", pattern.head(head).to_dense(), want[:, head : head + 1])
        tiles = want[0, 0].size * want.shape[0] * want.shape[1] if want.size else 0
        sparsity = 1 - want.sum() / max(tiles, 1)
        if abs(float(pattern.sparsity) - sparsity) > 1e-12:
            wrong.append(f"sparsity is {float(pattern.sparsity)}, not {sparsity}")
        if want.size:
            back = BlockPattern.from_block_mask(pattern.to_block_mask())
            compare("from_block_mask(to_block_mask)", back.to_dense(), want)
        if dice.chance(0.3):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "pattern.safetensors"
                pattern.save(path)
                loaded = BlockPattern.load(path)
            compare("load(save)", loaded.to_dense(), want)
            if (loaded.q_len, loaded.kv_len, loaded.block_size) != (n, m, sizes):
                wrong.append("load(save) has other lengths")
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {error}")
    about = f" | b={b} n={n} m={m} blocks={sizes} lists={indices.shape}"
    return [Outcome("pattern", "", "; ".join(wrong) + about if wrong else "")]
