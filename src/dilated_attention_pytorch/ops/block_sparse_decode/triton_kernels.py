"""Triton kernels of block-sparse decoding; ``triton_launch.py`` launches them.

A list's kept blocks, one after the other, are a sequence of ``count * BLOCK`` *columns*. The first
kernel splits the columns over programs; each does an online softmax over its part for the query
heads that share keys and list. The second adds the parts of a row up in a fixed order. Logits live
in base 2: the scale carries log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def split_kernel(
    query, q_stride_b, q_stride_h, q_stride_n,
    key, k_stride_b, k_stride_h, k_stride_m,
    value, v_stride_b, v_stride_h, v_stride_m,
    partial, partial_lse,
    counts, c_stride_b, c_stride_p, c_stride_n,
    indices, i_stride_b, i_stride_p, i_stride_n,
    block_bias, b_stride_b, b_stride_p, b_stride_n,
    lengths, starts,
    new, capacity, width, num_heads, scale2, splits,
    GROUP: tl.constexpr, HEADS_PER_LIST: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    BIAS: tl.constexpr, STARTS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Output and lse of one split: ``(b, h, n, splits, d)`` and ``(b, h, n, splits)``."""
    split = tl.program_id(0)
    first_head = tl.program_id(1) * PACK
    batch = tl.program_id(2) // new
    token = tl.program_id(2) % new
    batch64 = batch.to(tl.int64)
    token64 = token.to(tl.int64)
    shared64 = (first_head // HEADS_PER_LIST).to(tl.int64)
    kv_head64 = (first_head // GROUP).to(tl.int64)
    count = tl.load(counts + batch64 * c_stride_b + shared64 * c_stride_p + token64 * c_stride_n)
    count = tl.minimum(count, width)
    entries = indices + batch64 * i_stride_b + shared64 * i_stride_p + token64 * i_stride_n
    if BIAS:
        biases = block_bias + batch64 * b_stride_b + shared64 * b_stride_p + token64 * b_stride_n
    start = 0
    if STARTS:
        start = tl.minimum(tl.maximum(tl.load(starts + batch), 0), capacity).to(tl.int32)
    # The query sees the tokens up to its own.
    length = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), capacity).to(tl.int32)
    limit = length - new + token + 1
    limit = tl.minimum(limit, capacity - start)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    head = first_head + row
    inside = (row < PACK)[:, None] & (dim < HEAD_DIM)[None, :]
    place = batch64 * q_stride_b + token64 * q_stride_n + head.to(tl.int64) * q_stride_h
    q = tl.load(query + place[:, None] + dim[None, :], mask=inside, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    keys = key + batch64 * k_stride_b + kv_head64 * k_stride_h + dim[None, :]
    values = value + batch64 * v_stride_b + kv_head64 * v_stride_h + dim[None, :]

    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    tiles = tl.cdiv(count * BLOCK, COLUMNS)
    first = split * tiles // splits
    last = (split + 1) * tiles // splits
    lane = tl.arange(0, COLUMNS)
    # Block numbers are fetched one step ahead: an address that waits for another load takes the
    # place of a tile in flight.
    slot = (first * COLUMNS + lane) // BLOCK
    upcoming = tl.load(entries + slot, mask=slot < count, other=-1)
    for tile in tl.range(first, last, num_stages=STAGES):
        column = tile * COLUMNS + lane
        slot = column // BLOCK
        # Numbers of no block are out of sight, whatever they are.
        named = (upcoming >= 0) & (upcoming <= limit // BLOCK)
        position = tl.where(named, upcoming * BLOCK + column % BLOCK, limit)
        following = (column + COLUMNS) // BLOCK
        upcoming = tl.load(entries + following, mask=following < count, other=-1)
        visible = position < limit
        if BIAS:
            bias = tl.load(biases + slot, mask=slot < count, other=0.0) * LOG2E
            visible = visible & (bias != float("-inf"))
        # What is not visible is never read: it may be unwritten, and 0 * NaN is NaN.
        read = visible[:, None] & (dim < HEAD_DIM)[None, :]
        cached = (position + start).to(tl.int64)[:, None]
        k = tl.load(keys + cached * k_stride_m, mask=read, other=0.0)
        v = tl.load(values + cached * v_stride_m, mask=read, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if BIAS:
            s += bias[None, :]
        s = tl.where(visible[None, :], s, float("-inf"))
        new_high = tl.maximum(high, tl.max(s, 1))
        # A row that has seen nothing yet keeps -inf; 0 instead avoids -inf - -inf.
        base = tl.where(new_high == float("-inf"), 0.0, new_high)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(high - base)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        high = new_high
    empty = high == float("-inf")
    total = tl.where(empty, 1.0, total)
    cell = ((batch64 * num_heads + head) * new + token) * splits + split
    tl.store(partial + (cell * HEAD_DIM)[:, None] + dim[None, :], acc / total[:, None], mask=inside)
    tl.store(
        partial_lse + cell,
        tl.where(empty | (high == float("inf")), high, high + tl.log2(total)),
        mask=row < PACK,
    )


@triton.jit
def merge_kernel(
    partial, partial_lse, out, o_stride_b, o_stride_h, o_stride_n, lse,
    new, num_heads, splits,
    SPLITS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of one query row, weighted by their lse (in base 2)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    batch64 = tl.program_id(2).to(tl.int64)
    cell = (batch64 * num_heads + head) * new + token
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, D)
    part = tl.load(partial_lse + cell * splits + split, mask=split < splits, other=float("-inf"))
    high = tl.max(part, 0)
    empty = high == float("-inf")
    weight = tl.exp2(part - tl.where(empty, 0.0, high))
    total = tl.where(empty, 1.0, tl.sum(weight, 0))
    inside = (split < splits)[:, None] & (dim < HEAD_DIM)[None, :]
    place = ((cell * splits + split) * HEAD_DIM)[:, None] + dim[None, :]
    acc = tl.sum(tl.load(partial + place, mask=inside, other=0.0) * weight[:, None], 0)
    acc = acc / total
    target = out + batch64 * o_stride_b + head.to(tl.int64) * o_stride_h
    target += token.to(tl.int64) * o_stride_n
    tl.store(target + dim, acc.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    natural = tl.where(empty, float("-inf"), (high + tl.log2(total)) * LN2)
    # An infinite logit takes all the weight: not inf - inf.
    tl.store(lse + cell, tl.where(high == float("inf"), high, natural))


INTERPRETED = not isinstance(split_kernel, triton.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` was set when this file was imported: kernels run on the CPU."""
