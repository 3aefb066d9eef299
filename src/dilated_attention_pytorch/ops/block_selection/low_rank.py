"""Low-rank tile mass: where the attention of projected tokens goes, without their square.

For query block i, key block j and the heads that share a pattern, with the maps A and B of a head,
the mean over the block's sampled queries n (those that see a key) and over the heads of

    Σ_(m in j) softmax_m(scale · (q_n A) · (k_m B)),

of which the logarithm is written; and, where it is asked for, the largest of these sums, the
block's *peak*. Queries go through both maps, ``q A Bᵀ``, so that keys need none.
Logits are in base 2. A query sees one range of keys, its *span*.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.operators import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.triton_device import (
    INTERPRETED,
    PRECISE,
    batch_stride,
    follow,
    on_device,
    overlap,
    strides,
)

# Numbers that follow from lengths; see ``triton_device.VARYING``.
_LENGTHS = (
    "first_row", "num_rows", "total_rows", "kv_len", "columns", "chunks", "s_stride_b",
)  # fmt: skip
_FAR = tl.constexpr(2147483647)
_TINY = tl.constexpr(1.1754943508222875e-38)
# Block sums of one chunk of rows: 2**25 float32 numbers are 128 MiB.
_WORKSPACE = 1 << 25
# Key tokens per program: long enough to pay for its queries, short enough to share out evenly.
_KEYS = 1024


@triton.jit(do_not_specialize=_LENGTHS)
def fold_kernel(
    query, q_stride_b, q_stride_h, q_stride_n, query_map, key_map, out, total_rows, heads, factor,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    R: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every ``STRIDE``-th query through both maps: what its keys need no map for."""
    follow(PDL)
    plane = tl.cast(tl.program_id(1), tl.int64)
    head = plane % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    rank = tl.arange(0, R)
    inside = (row < total_rows)[:, None] & (column < HEAD_DIM)[None, :]
    source = query + plane // heads * q_stride_b + head * q_stride_h
    token = row.to(tl.int64) * STRIDE * q_stride_n
    q = tl.load(source + token[:, None] + column[None, :], mask=inside, other=0.0)
    place = head * HEAD_DIM * RANK + column[:, None] * RANK + rank[None, :]
    real = (column < HEAD_DIM)[:, None] & (rank < RANK)[None, :]
    a = tl.load(query_map + place, mask=real, other=0.0).to(tl.float32)
    b = tl.load(key_map + place, mask=real, other=0.0).to(tl.float32)
    short = tl.dot(q.to(tl.float32), a, input_precision=PRECISE)
    folded = tl.dot(short, tl.trans(b), input_precision=PRECISE) * factor
    target = out + (plane * total_rows + row)[:, None] * HEAD_DIM + column[None, :]
    tl.store(target, folded.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _block_sum(
    q, keys, k_stride_n, block, start, stop, kv_len,
    BLOCK: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per row the logarithm of the sum of exponentials over one key block; -inf where none."""
    step = tl.arange(0, N)
    key = block * BLOCK + step
    column = tl.arange(0, D)
    source = keys + key.to(tl.int64)[:, None] * k_stride_n + column[None, :]
    if MASKED:
        exists = (step < BLOCK) & (key < kv_len)
        k = tl.load(source, mask=exists[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < D:
        k = tl.load(source, mask=(column < HEAD_DIM)[None, :], other=0.0)
    else:
        k = tl.load(source)
    if UPCAST or WIDE:
        k = k.to(tl.float32)
    # Of bfloat16 the precision is no matter.
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISE)
    if MASKED:
        seen = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
        logits = tl.where(seen & (step < BLOCK)[None, :], logits, float("-inf"))
        peak = tl.max(logits, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(logits - peak[:, None]), 1)
        return tl.where(total > 0.0, peak + tl.log2(tl.maximum(total, _TINY)), float("-inf"))
    peak = tl.max(logits, 1)
    return peak + tl.log2(tl.sum(tl.exp2(logits - peak[:, None]), 1))


@triton.jit(do_not_specialize=_LENGTHS)
def block_sum_kernel(
    queries, key, k_stride_b, k_stride_h, k_stride_n, spans, s_stride_b, sums,
    first_row, num_rows, total_rows, kv_len, columns, chunks, heads, groups,
    BLOCK: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``_block_sum`` of some rows and of ``CHUNK`` key blocks, as ``(plane, block, row)``.

    What lies outside a row's span is not written, or -inf. ``WIDE``: in float32.
    """
    follow(PDL)
    chunk = tl.program_id(0) % chunks
    plane = tl.cast(tl.program_id(1), tl.int64)
    batch = plane // heads
    row = tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    span = spans + batch * s_stride_b + first_row + row
    start = tl.load(span, mask=inside, other=0)
    stop = tl.load(span + total_rows, mask=inside, other=0)
    sees = stop > start
    begin = tl.maximum(chunk * CHUNK, tl.min(tl.where(sees, start, _FAR), 0) // BLOCK)
    end = tl.minimum(chunk * CHUNK + CHUNK, tl.cdiv(tl.max(tl.where(sees, stop, 0), 0), BLOCK))
    # Blocks that every row sees all of; rows without keys may compute anything.
    full_begin = tl.cdiv(tl.max(tl.where(sees, start, 0), 0), BLOCK)
    full_end = tl.min(tl.where(sees, stop, _FAR), 0) // BLOCK
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    if EVEN == 0:
        full_begin = tl.minimum(begin, end)
        full_end = full_begin
    column = tl.arange(0, D)
    q = tl.load(
        queries + (plane * total_rows + first_row + row)[:, None] * HEAD_DIM + column[None, :],
        mask=(inside & (begin < end))[:, None] & (column < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    keys = key + batch * k_stride_b + plane % heads // groups * k_stride_h
    target = sums + plane * columns * num_rows + row
    for block in range(full_begin, full_end):
        found = _block_sum(
            q, keys, k_stride_n, block, start, stop, kv_len,
            BLOCK, N, D, HEAD_DIM, False, WIDE, UPCAST,
        )  # fmt: skip
        tl.store(target + tl.cast(block, tl.int64) * num_rows, found, mask=inside)
    before = full_begin - begin
    for n in range(before + end - full_end):
        block = tl.where(n < before, begin + n, full_end + n - before)
        found = _block_sum(
            q, keys, k_stride_n, block, start, stop, kv_len,
            BLOCK, N, D, HEAD_DIM, True, WIDE, UPCAST,
        )  # fmt: skip
        tl.store(target + tl.cast(block, tl.int64) * num_rows, found, mask=inside)


@triton.jit
def _load_sums(source, block, row, num_rows, start, stop, BLOCK: tl.constexpr):
    """Block sums ``(C, rows)``, -inf outside the spans."""
    first = block * BLOCK
    seen = (first[:, None] < stop[None, :]) & (first[:, None] + BLOCK > start[None, :])
    place = block.to(tl.int64)[:, None] * num_rows + row[None, :]
    return tl.load(source + place, mask=seen & (stop > start)[None, :], other=float("-inf"))


@triton.jit(do_not_specialize=_LENGTHS)
def mass_kernel(
    sums, spans, s_stride_b, scores, peaks, first_row, num_rows, total_rows, columns, heads,
    BLOCK: tl.constexpr, PER_BLOCK: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    SHARE: tl.constexpr, PEAKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The logarithm of the mean mass of one query block's rows and ``SHARE`` heads; peaks."""
    follow(PDL)
    plane = tl.cast(tl.program_id(1), tl.int64)
    batch = plane * SHARE // heads
    step = tl.arange(0, P)
    row = tl.program_id(0) * PER_BLOCK + step
    inside = (step < PER_BLOCK) & (row < num_rows)
    span = spans + batch * s_stride_b + first_row + row
    start = tl.load(span, mask=inside, other=0)
    stop = tl.load(span + total_rows, mask=inside, other=0)
    sees = stop > start
    weight = 1.0 / (tl.maximum(tl.sum(sees.to(tl.float32), 0), 1.0) * SHARE)
    low = tl.min(tl.where(sees, start, _FAR), 0) // BLOCK
    end = tl.cdiv(tl.max(tl.where(sees, stop, 0), 0), BLOCK)
    lane = tl.arange(0, C)
    blocks = tl.cdiv(total_rows, PER_BLOCK)
    target = (plane * blocks + first_row // PER_BLOCK + tl.program_id(0)) * columns
    for extra in range(SHARE):
        source = sums + (plane * SHARE + extra) * columns * num_rows
        peak = tl.full([P], float("-inf"), tl.float32)
        total = tl.zeros([P], tl.float32)
        for at in range(low, end, C):
            value = _load_sums(source, at + lane, row, num_rows, start, stop, BLOCK)
            higher = tl.maximum(peak, tl.max(value, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(value - base[None, :]), 0)
            peak = higher
        base = tl.where(sees, peak + tl.log2(tl.maximum(total, _TINY)), 0.0)
        for at in range(0, columns, C):
            block = at + lane
            value = _load_sums(source, block, row, num_rows, start, stop, BLOCK)
            shares = tl.exp2(value - base[None, :])
            mass = tl.sum(shares, 1) * weight
            ok = block < columns
            if extra > 0:
                mass += tl.load(scores + target + block, mask=ok, other=0.0)
            if extra == SHARE - 1:
                mass = tl.log(tl.maximum(mass, _TINY))
            tl.store(scores + target + block, mass, mask=ok)
            if PEAKS:
                highest = tl.max(shares, 1)
                if extra > 0:
                    others = tl.load(peaks + target + block, mask=ok, other=0.0)
                    highest = tl.maximum(highest, others)
                tl.store(peaks + target + block, highest, mask=ok)
        # The next head adds to what other threads may have written.
        tl.debug_barrier()


@torch.library.custom_op(f"{NAMESPACE}::low_rank_scores", mutates_args=())
def low_rank_op(
    query: Tensor, key: Tensor, query_map: Tensor, key_map: Tensor, spans: Tensor,
    query_stride: int, block_size: int, scale: float, pattern_heads: int, want_peaks: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:class:`LowRankScorer` on all tiles: ``(b, pattern heads, i, j)`` float32. No gradient.

    Beside the scores the peaks; empty if they are not wanted.

    Queries ``(b, n, h, d)`` and keys ``(b, m, g, d)`` share a dtype; maps are ``(h, d, r)``.
    ``spans`` is ``(1 or b, 2, t)`` int32: first key that every ``query_stride``-th query sees, and
    one past the last; nothing if ``end <= first``.
    """
    query, key, spans = rows_of(query), rows_of(key), spans.contiguous()
    batch, n, heads, head_dim = query.shape
    blocks, columns = ceil_div(n, block_size), ceil_div(key.shape[1], block_size)
    scores, peaks = found = _empty_maps(query, batch, pattern_heads, blocks, columns, want_peaks)
    if scores.numel() == 0:
        return found
    total_rows, planes, device = spans.shape[2], batch * heads, query.device
    d, rank = max(triton.next_power_of_2(head_dim), 16), query_map.shape[2]
    # bfloat16 keys need no rounding, and queries lose what they lost when they were made.
    wide = query.dtype != torch.bfloat16
    folded = torch.empty(
        planes, total_rows, head_dim, device=device,
        dtype=torch.float32 if wide else torch.bfloat16,
    )  # fmt: skip
    tile_columns = max(triton.next_power_of_2(block_size), 16)
    # 64 logits a thread, so that three programs fit on a multiprocessor.
    tile_rows = 128 if tile_columns <= 64 and d <= 128 else 64
    size = tile_columns * d * (4 if wide else 2)
    stages = 3 if size <= 16384 else 2 if size <= 32768 else 1
    per_block = block_size // query_stride
    chunk_blocks = max(_WORKSPACE // (planes * columns * per_block), 1)
    sums = folded.new_empty(
        planes * columns * min(chunk_blocks * per_block, total_rows), dtype=torch.float32
    )
    key_chunk = max(_KEYS // block_size, 1)
    key_chunks = ceil_div(columns, key_chunk)
    with on_device(device):
        fold_kernel[(ceil_div(total_rows, 64), planes)](
            query, *strides(query), query_map.contiguous(), key_map.contiguous(), folded,
            total_rows, heads, scale / math.log(2), STRIDE=query_stride, ROWS=64, D=d,
            HEAD_DIM=head_dim, R=max(triton.next_power_of_2(rank), 16), RANK=rank,
            num_warps=4, **overlap(device),
        )  # fmt: skip
        for first in range(0, blocks, chunk_blocks):
            first_row = first * per_block
            num_rows = min(chunk_blocks * per_block, total_rows - first_row)
            block_sum_kernel[(key_chunks * ceil_div(num_rows, tile_rows), planes)](
                folded, key, *strides(key), spans, batch_stride(spans), sums,
                first_row, num_rows, total_rows, key.shape[1], columns, key_chunks, heads,
                heads // key.shape[2], BLOCK=block_size, N=tile_columns,
                CHUNK=key_chunk, ROWS=tile_rows, D=d, HEAD_DIM=head_dim,
                EVEN=tile_columns == block_size, WIDE=wide, UPCAST=INTERPRETED,
                num_warps=8 if tile_columns > 128 else 4, num_stages=stages, **overlap(device),
            )  # fmt: skip
            mass_kernel[(ceil_div(num_rows, per_block), batch * pattern_heads)](
                sums, spans, batch_stride(spans), scores, peaks, first_row, num_rows, total_rows,
                columns, heads, BLOCK=block_size, PER_BLOCK=per_block,
                P=triton.next_power_of_2(per_block), C=max(2048 // per_block, 16),
                SHARE=heads // pattern_heads, PEAKS=want_peaks, num_warps=4, **overlap(device),
            )  # fmt: skip
    return found


def _empty_maps(query: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
    *shape, want_peaks = sizes
    scores = query.new_empty(shape, dtype=torch.float32)
    return scores, torch.empty_like(scores) if want_peaks else scores.new_empty(0)


@low_rank_op.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    block_size, pattern_heads, want_peaks = rest[4], *rest[6:]
    rows, columns = (ceil_div(x.shape[1], block_size) for x in (query, key))
    return _empty_maps(query, query.shape[0], pattern_heads, rows, columns, want_peaks)
