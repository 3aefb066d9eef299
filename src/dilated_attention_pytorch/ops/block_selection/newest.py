"""What a new token does to the state of a layer: ring buffers take it, and its row gets a list.

``append``: see :func:`append_tokens`. ``list``: the newest sampled query of a row adds to the mass
that those before it gave every block (the sum that ``low_rank.py`` defines, of one query), and of
the sum c_j of n queries the row reads

* its forced blocks, and of the others the ``quota`` with the highest peaks;
* every block with ``(c_j / n) / Σ_visible (c / n) >= threshold``;
* the best of the rest, up to ``least`` blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_selection.choice import (
    KEY_OF_FORBIDDEN,
    KEY_OF_FORCED,
    highest,
    order,
    running_count,
)
from dilated_attention_pytorch.ops.operators import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.triton_device import (
    batch_stride,
    follow,
    on_device,
    overlap,
    plane_strides,
    strides,
)

_TINY = tl.constexpr(1.1754943508222875e-38)
# Key tokens per program: a few dozen programs a head of a long cache.
_KEYS = 1024
_LENGTHS = ("capacity", "columns", "chunks", "room", "width", "k_stride_b")


@triton.jit
def append_kernel(
    queries, keys, lengths, starts,
    query, q_stride_b, q_stride_n, q_stride_h, q_stride_d,
    key, k_stride_b, k_stride_n, k_stride_h, k_stride_d,
    new, ring, query_size, key_size,
    DIM: tl.constexpr, CACHED: tl.constexpr, STARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per sample: nobody else reads the length that it changes."""
    batch = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + batch)
    first = length * 0
    if CACHED:
        first = length
        if STARTS:
            first += tl.load(starts + batch)
    lane = tl.arange(0, CHUNK)
    for token in range(new):
        slot = batch * ring + (length + token) % ring
        for chunk in range(0, query_size, CHUNK):
            place = chunk + lane
            inside = place < query_size
            source = query + batch * q_stride_b + token * q_stride_n
            source += (place // DIM).to(tl.int64) * q_stride_h + place % DIM * q_stride_d
            x = tl.load(source, mask=inside, other=0.0)
            tl.store(queries + slot * query_size + place, x, mask=inside)
        for chunk in range(0, key_size, CHUNK):
            place = chunk + lane
            inside = place < key_size
            source = key + batch * k_stride_b + (first + token) * k_stride_n
            source += (place // DIM).to(tl.int64) * k_stride_h + place % DIM * k_stride_d
            x = tl.load(source, mask=inside, other=0.0)
            tl.store(keys + slot * key_size + place, x, mask=inside)
    # Every thread must have read the length before one writes it.
    tl.debug_barrier()
    tl.store(lengths + batch, length + new)


@torch.library.custom_op(f"{NAMESPACE}::append_tokens", mutates_args=("queries", "keys", "lengths"))
def append_op(
    queries: Tensor, keys: Tensor, lengths: Tensor, query: Tensor, key: Tensor, cached: bool,
    starts: Tensor | None,
) -> None:  # fmt: skip
    """Arguments as of :func:`append_tokens`."""
    batch, new, heads, dim = query.shape
    if batch == 0 or new == 0:
        return
    with on_device(query.device):
        append_kernel[(batch,)](
            queries, keys, lengths, lengths if starts is None else starts,
            query, *query.stride(), key, *key.stride(),
            new, queries.shape[1], heads * dim, key.shape[2] * dim,
            DIM=dim, CACHED=cached, STARTS=starts is not None, CHUNK=1024, num_warps=4,
        )  # fmt: skip


@append_op.register_fake
def _(*_: Any) -> None:
    return None


@triton.jit
def _place(lengths, known, batch, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """The newest row, how many of its queries count so far, the newest one, whether it is there."""
    length = tl.load(lengths + batch)
    row = tl.maximum(length - 1, 0) // SIZE
    start = tl.maximum(row * SIZE, tl.load(known + batch))
    count = tl.maximum(length - 1 - start, 0) // STRIDE + 1
    newest = start + (count - 1) * STRIDE
    return row, count, newest, newest < length


@triton.jit(do_not_specialize=_LENGTHS)
def newest_sum_kernel(
    queries, key, k_stride_b, k_stride_h, k_stride_n, query_map, key_map, lengths, known, starts,
    sums, ring, capacity, columns, chunks, heads, groups, factor,
    BLOCK: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
    STARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query of a head on ``CHUNK`` key blocks: logarithms of sums of exponentials, base 2."""
    follow(PDL)
    chunk = tl.program_id(0)
    plane = tl.cast(tl.program_id(1), tl.int64)
    batch, head = plane // heads, plane % heads
    _row, _count, newest, sees = _place(lengths, known, batch, BLOCK, STRIDE)
    column, rank = tl.arange(0, D), tl.arange(0, R)
    inside = column < HEAD_DIM
    source = queries + ((batch * ring + newest % ring) * heads + head) * HEAD_DIM
    q = tl.load(source + column, mask=inside & sees, other=0.0).to(tl.float32)
    place = head * HEAD_DIM * RANK + column[:, None] * RANK + rank[None, :]
    real = inside[:, None] & (rank < RANK)[None, :]
    a = tl.load(query_map + place, mask=real, other=0.0).to(tl.float32)
    b = tl.load(key_map + place, mask=real, other=0.0).to(tl.float32)
    short = tl.sum(q[:, None] * a, 0)
    folded = tl.sum(short[None, :] * b, 1) * factor
    if key.dtype.element_ty == tl.bfloat16:
        # As in a pass, so that it chooses alike.
        folded = folded.to(tl.bfloat16).to(tl.float32)
    first = newest * 0
    if STARTS:
        first += tl.load(starts + batch)
    tokens = tl.minimum(tl.minimum(newest + 1, capacity - first), columns * BLOCK)
    tokens = tl.where(sees, tokens, 0)
    step = tl.arange(0, N)
    keys = key + batch * k_stride_b + first * k_stride_n + head // groups * k_stride_h
    for block in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tl.cdiv(tokens, BLOCK))):
        token = block * BLOCK + step
        seen = (step < BLOCK) & (token < tokens)
        k = tl.load(
            keys + token.to(tl.int64)[:, None] * k_stride_n + column[None, :],
            mask=seen[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        logits = tl.sum(k.to(tl.float32) * folded[None, :], 1)
        logits = tl.where(seen, logits, float("-inf"))
        peak = tl.max(logits, 0)
        total = tl.sum(tl.exp2(logits - peak), 0)
        tl.store(sums + plane * columns + block, peak + tl.log2(total))


@triton.jit(do_not_specialize=_LENGTHS)
def newest_list_kernel(
    sums, lengths, known, starts, threshold, own_thresholds, t_stride_b,
    least, f_stride_b, f_stride_h, quota, m_stride_b, m_stride_h,
    masses, peaks, sampled, counts, indices, capacity, columns, heads, lists, room, width,
    sinks, near,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SHARE: tl.constexpr, C: tl.constexpr,
    W: tl.constexpr, STARTS: tl.constexpr, OWN: tl.constexpr, LEAST: tl.constexpr,
    PEAKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds what a list's heads give every block, and lists the row's."""
    follow(PDL)
    place = tl.cast(tl.program_id(0), tl.int64)
    batch, head = place // lists, place % lists
    row, count, newest, sees = _place(lengths, known, batch, BLOCK, STRIDE)
    lane = tl.arange(0, C)
    first = newest * 0
    if STARTS:
        first += tl.load(starts + batch)
    tokens = tl.minimum(tl.minimum(newest + 1, capacity - first), columns * BLOCK)
    tokens = tl.where(sees, tokens, 0)
    seen = lane < tl.cdiv(tokens, BLOCK)
    mass, highest_share = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for extra in range(SHARE):
        source = sums + (batch * heads + head * SHARE + extra) * columns
        value = tl.load(source + lane, mask=seen, other=float("-inf"))
        peak = tl.max(value, 0)
        share = tl.where(seen, tl.exp2(value - peak), 0.0)
        total = tl.sum(share, 0)
        share = tl.div_rn(share, tl.where(total > 0.0, total, 1.0))
        mass += share / SHARE
        highest_share = tl.maximum(highest_share, share)
    begins, more = count == 1, newest > tl.load(sampled + place)
    inside = lane < columns
    entry = place * room + 1 + lane
    before = tl.load(masses + entry, mask=inside, other=0.0)
    mass = tl.where(begins, mass, tl.where(more, before + mass, before))
    tl.store(masses + entry, mass, mask=inside)
    mean = tl.maximum(mass / count.to(tl.float32), _TINY)
    end = tl.minimum(row + 1, columns)
    visible = lane < end
    kept = visible & ((lane < sinks) | (lane >= row - near))
    if PEAKS:
        before = tl.load(peaks + entry, mask=inside, other=0.0)
        highest_share = tl.where(begins, highest_share, tl.maximum(before, highest_share))
        tl.store(peaks + entry, highest_share, mask=inside)
        free = visible & (kept == 0)
        many = tl.sum(free.to(tl.int32), 0)
        taken = tl.load(quota + batch * m_stride_b + head * m_stride_h)
        taken = tl.minimum(tl.maximum(taken, 0), many)
        key = tl.where(free, order(highest_share), KEY_OF_FORBIDDEN)
        lowest = tl.min(tl.where(free, key, KEY_OF_FORCED), 0)
        kept |= free & highest(key, taken, lowest, many, tl.max(key, 0) + 1, 0, C, True)
    if OWN:
        threshold = tl.load(own_thresholds + batch * t_stride_b)
    total = tl.sum(tl.where(visible, mean, 0.0), 0)
    reached = visible & (kept == 0) & (tl.div_rn(mean, total) >= threshold)
    must = tl.sum(kept.to(tl.int32), 0)
    wanted = must + tl.sum(reached.to(tl.int32), 0)
    if LEAST:
        wanted = tl.maximum(wanted, tl.load(least + batch * f_stride_b + head * f_stride_h))
    many = tl.sum(visible.to(tl.int32), 0)
    wanted = tl.minimum(wanted, many)
    key = tl.where(kept, KEY_OF_FORCED, order(tl.log(mean)))
    key = tl.where(visible, key, KEY_OF_FORBIDDEN)
    lowest = tl.min(tl.where(visible, key, KEY_OF_FORCED), 0)
    # Past the highest key but for those that are kept, which wrap around.
    chosen = highest(key, wanted, lowest, many, tl.max(key + 1, 0), must, C, True)
    every = (visible & chosen).to(tl.int32)
    slot = running_count(every, C) - 1
    found = tl.minimum(tl.sum(every, 0), width)
    target = indices + place * width
    tl.store(target + slot, lane, mask=(every > 0) & (slot < width))
    rest = tl.arange(0, W)
    tl.store(target + rest, rest * 0, mask=(rest >= found) & (rest < width))
    # Every thread must have read what one of them writes.
    tl.debug_barrier()
    tl.store(counts + place, found)
    tl.store(sampled + place, newest)


@torch.library.custom_op(
    f"{NAMESPACE}::list_newest", mutates_args=("masses", "peaks", "sampled", "counts", "indices")
)
def list_newest_op(
    queries: Tensor, key: Tensor, query_map: Tensor, key_map: Tensor, lengths: Tensor,
    known: Tensor, starts: Tensor | None, threshold: float, own_thresholds: Tensor | None,
    least: Tensor | None, quota: Tensor | None, masses: Tensor, peaks: Tensor, sampled: Tensor,
    counts: Tensor, indices: Tensor, blocks: int, block_size: int, stride: int, scale: float,
    sinks: int, near: int,
) -> None:  # fmt: skip
    """Arguments as of :func:`list_newest`."""
    batch, lists, width = indices.shape
    if indices.numel() == 0:
        return
    key, (ring, heads, dim) = rows_of(key), queries.shape[1:]
    rank, groups = query_map.shape[2], heads // key.shape[2]
    sums = torch.empty(batch * heads * blocks, device=key.device, dtype=torch.float32)
    n, d = (max(triton.next_power_of_2(x), 16) for x in (block_size, dim))
    c, device = max(triton.next_power_of_2(blocks), 32), key.device
    chunk = max(_KEYS // block_size, 1)
    chunks = ceil_div(blocks, chunk)
    some = lengths if starts is None else starts
    none: tuple[Any, ...] = (lengths, 0, 0)
    with on_device(device):
        newest_sum_kernel[(chunks, batch * heads)](
            queries, key, *strides(key), query_map.contiguous(), key_map.contiguous(), lengths,
            known, some, sums, ring, key.shape[1], blocks, chunks, heads, groups,
            scale / math.log(2), BLOCK=block_size, N=n, STRIDE=stride, CHUNK=chunk, D=d,
            HEAD_DIM=dim, R=max(triton.next_power_of_2(rank), 16), RANK=rank,
            STARTS=starts is not None, num_warps=4, **overlap(device),
        )  # fmt: skip
        newest_list_kernel[(batch * lists,)](
            sums, lengths, known, some, threshold,
            lengths if own_thresholds is None else own_thresholds,
            0 if own_thresholds is None else batch_stride(own_thresholds),
            *(none if least is None else (least, *plane_strides(least))),
            *(none if quota is None else (quota, *plane_strides(quota))),
            masses, peaks, sampled, counts, indices, key.shape[1], blocks, heads, lists,
            masses.shape[2], width, sinks, near, BLOCK=block_size, STRIDE=stride,
            SHARE=heads // lists, C=c, W=triton.next_power_of_2(width),
            STARTS=starts is not None, OWN=own_thresholds is not None, LEAST=least is not None,
            PEAKS=quota is not None, num_warps=min(max(c // 256, 1), 16), **overlap(device),
        )  # fmt: skip


@list_newest_op.register_fake
def _(*_: Any) -> None:
    return None
