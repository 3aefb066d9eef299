"""Kernels of the low-rank tile mass: where the attention of projected tokens goes.

Logits are in base 2. A query sees one range of keys, its *span*; a query without keys counts for
nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_selection.triton_kernels.shared import PRECISE, follow

# Numbers that follow from lengths; see ``shared.VARYING``.
_LENGTHS = (
    "first_row", "num_rows", "total_rows", "kv_len", "columns", "chunks", "s_stride_b",
)  # fmt: skip
_FAR = tl.constexpr(2147483647)
_TINY = tl.constexpr(1.1754943508222875e-38)


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
    sums, spans, s_stride_b, scores, first_row, num_rows, total_rows, columns, heads,
    BLOCK: tl.constexpr, PER_BLOCK: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The logarithm of the mean mass of one query block's rows and ``SHARE`` heads."""
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
    target = scores + (plane * blocks + first_row // PER_BLOCK + tl.program_id(0)) * columns
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
            mass = tl.sum(tl.exp2(value - base[None, :]), 1) * weight
            ok = block < columns
            if extra > 0:
                mass += tl.load(target + block, mask=ok, other=0.0)
            if extra == SHARE - 1:
                mass = tl.log(tl.maximum(mass, _TINY))
            tl.store(target + block, mass, mask=ok)
        # The next head adds to what other threads may have written.
        tl.debug_barrier()
