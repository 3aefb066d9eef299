"""Independent oracles: plain Python loops over blocks, and one dense attention in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_blocks(
    row: int,
    *,
    q_len: int,
    kv_len: int,
    size: int,
    causal: bool,
    length: int | None = None,
    offset: int | None = None,
    one_sequence: bool | None = None,
) -> list[int]:
    """Key blocks in which any token of a query block may read any token."""
    offset = kv_len - q_len if offset is None else offset
    length = kv_len if length is None else length
    one_sequence = q_len == kv_len if one_sequence is None else one_sequence
    queries = range(row * size, min(row * size + size, q_len))
    if one_sequence and row * size >= length:
        return []
    last = max(queries) + offset if causal else kv_len - 1
    return sorted({m // size for m in range(min(length, last + 1, kv_len)) if m >= 0})


def forced_blocks(
    row: int,
    visible: list[int],
    *,
    q_len: int,
    kv_len: int,
    size: int,
    causal: bool,
    local: int,
    sink: int,
    diagonal: bool,
    offset: int | None = None,
) -> set[int]:
    """Sinks, and the neighbourhood of the blocks at the queries' own positions."""
    offset = kv_len - q_len if offset is None else offset
    forced = set(range(sink))
    if diagonal:
        first = max((row * size + offset) // size, 0)
        last = (min(row * size + size, q_len) - 1 + offset) // size
        last = min(last, math.ceil(kv_len / size) - 1)
        forced |= set(range(first - local, last + 1 + (0 if causal else local)))
    return forced & set(visible)


def lattice_blocks(
    row: int,
    head: int,
    visible: list[int],
    segments: list[int],
    rates: list[int],
    *,
    q_len: int,
    kv_len: int,
    size: int,
) -> set[int]:
    """Visible blocks on the lattice of some group."""
    own = max((row * size + kv_len - q_len) // size, 0)
    kept = set()
    for length, rate in zip(segments, rates, strict=True):
        blocks = math.ceil(length / size)
        for j in visible:
            if j // blocks == own // blocks and (j % blocks) % rate == head % rate:
                kept.add(j)
    return kept


def water_level(share: float, forced: list[int], limit: list[int], allowed: list[int]) -> float:
    """The level that spends ``share`` of all allowed tiles, by bisection."""
    goal, low, high = share * sum(allowed), 0.0, float(max(limit, default=0)) + 1
    for _ in range(80):
        level = (low + high) / 2
        spent = sum(min(max(level, f), c) for f, c in zip(forced, limit, strict=True))
        low, high = (level, high) if spent < goal else (low, level)
    return (low + high) / 2


def running_round(shares: list[float], head: int = 0, heads: int = 1) -> list[int]:
    """Integers whose running sums are the rounded running sums.

    Heads round up in different rows, the last one soonest; one alone rounds to the nearest.
    """
    out, total, given = [], 0.0, 0
    for share in shares:
        total += share
        out.append(math.floor(total + (head + 0.5) / heads) - given)
        given += out[-1]
    return out


def best(scores: list[float], allowed: list[bool], count: int) -> list[int]:
    """The ``count`` best allowed columns: ties to the lower one, NaN last."""
    columns = [c for c, ok in enumerate(allowed) if ok]
    key = [-math.inf if math.isnan(s) else s for s in scores]
    return sorted(sorted(columns, key=lambda c: (-key[c], c))[:count])


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tensor | None = None,
    *,
    size: int = 64,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Masked softmax attention in float64.

    ``tiles`` and ``bias`` are ``(batch, heads, i, j)``, one number per tile; None: all tiles, none.
    """
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n, m = q.shape[2], k.shape[2]

    def spread(x: Tensor) -> Tensor:
        x = x.repeat_interleave(q.shape[1] // x.shape[1], 1)
        return x.repeat_interleave(size, 2)[:, :, :n].repeat_interleave(size, 3)[..., :m]

    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + spread(bias)
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    if causal:
        hidden = hidden | torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
    if tiles is not None:
        hidden = hidden | ~spread(tiles)
    p = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0)
    return (p @ v).transpose(1, 2)
