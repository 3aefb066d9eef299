"""Triton kernels of block-sparse attention, their launch configurations and launchers.

Names inside the kernels: a *tile* is one kept (query block, key block) pair of the pattern. A
program works on ``ROWS`` query tokens of ``PACK`` query heads that share keys and pattern, or on
``COLUMNS`` key tokens; both divide the pattern's blocks. Logits live in base 2: the scale carries
log2(e), so that every exponential is one ``exp2``.

Gradients are deterministic without atomics: one program owns dK and dV of a key tile, another dQ
of a query tile. The logits' gradient dS that the first computes is kept for the second in a
workspace of bounded size; where that does not fit, the second recomputes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_rows(
    source,
    stride_b,
    stride_h,
    stride_n,
    batch,
    head,
    start,
    length,
    HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``(HEADS * COUNT, D)``: tokens ``start...`` of ``HEADS`` heads; zero past the edges."""
    if TMA:
        tile = source.load([batch, head, start, 0]).reshape([HEADS * COUNT, D])
    else:
        row = tl.arange(0, HEADS * COUNT)
        token = start + row % COUNT
        column = tl.arange(0, D)
        offset = tl.cast(batch, tl.int64) * stride_b + (head + row // COUNT).to(tl.int64) * stride_h
        offset += token.to(tl.int64) * stride_n
        inside = (token < length)[:, None] & (column < HEAD_DIM)[None, :]
        tile = tl.load(source + offset[:, None] + column[None, :], mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store_rows(
    target,
    stride_b,
    stride_h,
    stride_n,
    batch,
    head,
    start,
    length,
    tile,
    HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    row = tl.arange(0, HEADS * COUNT)
    token = start + row % COUNT
    column = tl.arange(0, D)
    offset = tl.cast(batch, tl.int64) * stride_b + (head + row // COUNT).to(tl.int64) * stride_h
    offset += token.to(tl.int64) * stride_n
    inside = (token < length)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(
        target + offset[:, None] + column[None, :], tile.to(target.dtype.element_ty), mask=inside
    )


@triton.jit
def _visible(
    row,
    column,
    batch,
    key_limit,
    offset,
    documents,
    q_len,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """The token rule for broadcastable token numbers ``row`` and ``column``."""
    ok = column < key_limit
    if CAUSAL:
        ok = ok & (column <= row + offset)
    if DOCUMENTS:
        ids = documents + tl.cast(batch, tl.int64) * q_len
        of_row = tl.load(ids + row, mask=row < q_len, other=-1)
        of_column = tl.load(ids + column, mask=column < q_len, other=-2)
        ok = ok & (of_row == of_column) & (of_row >= 0)
    return ok


@triton.jit
def _without_padding(tile, column, key_limit):
    """Zeroes key or value rows that are padding: what lies there may be NaN, and 0 * NaN is NaN."""
    return tl.where((column < key_limit)[:, None], tile, 0.0).to(tile.dtype)


@triton.jit
def _document_of(documents, bounds, batch, first, last, q_len):
    """Start and end of the one document that tokens ``first`` to ``last`` share; (0, 0) if many."""
    ids = documents + tl.cast(batch, tl.int64) * q_len
    low = tl.load(ids + first)
    high = tl.load(ids + last)
    one = (low == high) & (low >= 0)
    ends = bounds + tl.cast(batch, tl.int64) * 2 * q_len
    start = tl.load(ends + first)
    end = tl.load(ends + q_len + first)
    return tl.where(one, start, 0), tl.where(one, end, 0)


@triton.jit
def _count_below(entries, count, divisor, factor, threshold):
    """How many of the first ``count`` ascending entries have ``entry // divisor * factor`` below."""  # noqa: E501
    lane = tl.arange(0, 128)
    total = 0
    for chunk in range(0, count, 128):
        place = chunk + lane
        entry = tl.load(entries + place, mask=place < count, other=0)
        below = (entry // divisor * factor < threshold) & (place < count)
        total += tl.sum(below.to(tl.int32))
    return total


@triton.jit
def _forward_tile(
    acc,
    high,
    total,
    q,
    key_source,
    value_source,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    batch,
    kv_head,
    start,
    kv_len,
    bias,
    scale2,
    row,
    key_limit,
    offset,
    documents,
    q_len,
    D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax over ``COLUMNS`` keys from ``start``."""
    k = _load_rows(
        key_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    v = _load_rows(
        value_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        column = start + tl.arange(0, COLUMNS)
        ok = _visible(
            row[:, None], column[None, :], batch, key_limit, offset, documents, q_len,
            CAUSAL, DOCUMENTS,
        )  # fmt: skip
        s = tl.where(ok, s, float("-inf"))
        v = _without_padding(v, column, key_limit)
    new_high = tl.maximum(high, tl.max(s, 1) * scale2 + bias)
    # A row that has seen nothing yet keeps -inf; 0 instead avoids -inf - -inf.
    base = tl.where(new_high == float("-inf"), 0.0, new_high) if MASKED else new_high
    p = tl.exp2(s * scale2 + (bias - base)[:, None])
    shrink = tl.exp2(high - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_high, total


@triton.jit
def _forward_kernel(
    q_source, q_stride_b, q_stride_h, q_stride_n,
    k_source, k_stride_b, k_stride_h, k_stride_n,
    v_source, v_stride_b, v_stride_h, v_stride_n,
    out, o_stride_b, o_stride_h, o_stride_n,
    lse,
    counts, c_stride_b, c_stride_p, c_stride_i,
    indices, i_stride_b, i_stride_p, i_stride_i,
    block_bias, b_stride_b, b_stride_p, b_stride_i,
    key_lengths, offsets, documents, bounds,
    q_len, kv_len, offset, scale2, num_heads, query_tiles,
    GROUP: tl.constexpr, HEADS_PER_PATTERN: tl.constexpr, PACK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
    DOCUMENTS: tl.constexpr, EVEN_KEYS: tl.constexpr,
    TMA_Q: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the last rows hold the most tiles: they start first.
    query_tile = query_tiles - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    head = tl.program_id(1) * PACK
    batch = tl.program_id(2)
    kv_head = head // GROUP
    shared = head // HEADS_PER_PATTERN
    first = query_tile * ROWS
    block = first // BLOCK_Q
    batch64 = tl.cast(batch, tl.int64)
    shared64 = tl.cast(shared, tl.int64)
    block64 = tl.cast(block, tl.int64)
    count = tl.load(counts + batch64 * c_stride_b + shared64 * c_stride_p + block64 * c_stride_i)
    entries = indices + batch64 * i_stride_b + shared64 * i_stride_p + block64 * i_stride_i
    if BIAS:
        biases = block_bias + batch64 * b_stride_b + shared64 * b_stride_p + block64 * b_stride_i
    if OFFSETS:
        offset = tl.load(offsets + batch).to(tl.int32)
    key_limit = kv_len
    if LENGTHS:
        key_limit = tl.minimum(tl.load(key_lengths + batch).to(tl.int32), kv_len)
    # Tiles [low, full) of the ascending list need no mask.
    low = 0
    full = count
    if CAUSAL or LENGTHS or DOCUMENTS or not EVEN_KEYS:
        unmasked_end = key_limit
        if CAUSAL:
            unmasked_end = tl.minimum(unmasked_end, first + offset + 1)
        if DOCUMENTS:
            last = tl.minimum(first + ROWS, q_len) - 1
            start, end = _document_of(documents, bounds, batch, first, last, q_len)
            unmasked_end = tl.minimum(unmasked_end, end)
            low = _count_below(entries, count, 1, BLOCK_K, start)
        full = _count_below(entries, count, 1, BLOCK_K, unmasked_end - BLOCK_K + 1)
        full = tl.maximum(full, low)
    q = _load_rows(
        q_source, q_stride_b, q_stride_h, q_stride_n, batch, head, first, q_len,
        PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    row = first + tl.arange(0, PACK * ROWS) % ROWS
    high = tl.full([PACK * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([PACK * ROWS], tl.float32)
    acc = tl.zeros([PACK * ROWS, D], tl.float32)
    PARTS: tl.constexpr = BLOCK_K // COLUMNS
    # The list entry of the next step is fetched one step ahead: its address depends on nothing.
    upcoming = tl.load(entries + low, mask=low < full, other=0)
    for step in tl.range(low * PARTS, full * PARTS, num_stages=STAGES):
        slot = step // PARTS
        start = upcoming * BLOCK_K + (step % PARTS) * COLUMNS
        following = (step + 1) // PARTS
        upcoming = tl.load(entries + following, mask=following < full, other=0)
        bias = 0.0
        if BIAS:
            bias = tl.load(biases + slot) * LOG2E
        acc, high, total = _forward_tile(
            acc, high, total, q, k_source, v_source,
            k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
            batch, kv_head, start, kv_len, bias, scale2,
            row, key_limit, offset, documents, q_len,
            D, HEAD_DIM, COLUMNS, CAUSAL, DOCUMENTS, False, TMA, UPCAST, PRECISION,
        )  # fmt: skip
    if CAUSAL or LENGTHS or DOCUMENTS or not EVEN_KEYS:
        for step in tl.range(0, (count - (full - low)) * PARTS, num_stages=1):
            slot = step // PARTS
            slot = tl.where(slot < low, slot, slot + full - low)
            start = tl.load(entries + slot) * BLOCK_K + (step % PARTS) * COLUMNS
            bias = 0.0
            if BIAS:
                bias = tl.load(biases + slot) * LOG2E
            acc, high, total = _forward_tile(
                acc, high, total, q, k_source, v_source,
                k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
                batch, kv_head, start, kv_len, bias, scale2,
                row, key_limit, offset, documents, q_len,
                D, HEAD_DIM, COLUMNS, CAUSAL, DOCUMENTS, True, TMA, UPCAST, PRECISION,
            )  # fmt: skip
    empty = high == float("-inf")
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    _store_rows(
        out, o_stride_b, o_stride_h, o_stride_n, batch, head, first, q_len, acc,
        PACK, ROWS, D, HEAD_DIM,
    )  # fmt: skip
    of_row = head + tl.arange(0, PACK * ROWS) // ROWS
    place = (batch64 * num_heads + of_row) * q_len + row
    natural = tl.where(empty, float("-inf"), (high + tl.log2(total)) * LN2)
    tl.store(lse + place, natural, mask=row < q_len)


@triton.jit
def _row_kernel(
    out, o_stride_b, o_stride_h, o_stride_n,
    grad_out, g_stride_b, g_stride_h, g_stride_n,
    lse, grad_lse, lse2, delta, norm,
    q_len, padded_len, num_heads,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """What the backward kernels need of every query row; rows past the end get lse = +inf."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    o = _load_rows(
        out, o_stride_b, o_stride_h, o_stride_n, batch, head, first, q_len,
        1, ROWS, D, HEAD_DIM, False, True,
    )  # fmt: skip
    g = _load_rows(
        grad_out, g_stride_b, g_stride_h, g_stride_n, batch, head, first, q_len,
        1, ROWS, D, HEAD_DIM, False, True,
    )  # fmt: skip
    row = first + tl.arange(0, ROWS)
    plane = tl.cast(batch, tl.int64) * num_heads + head
    read = plane * q_len + row
    write = plane * padded_len + row
    inside = row < q_len
    log_sum = tl.load(lse + read, mask=inside, other=float("-inf"))
    # +inf makes exp2(s - lse) zero: empty rows and rows past the end cost the kernels no mask.
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2E)
    tl.store(lse2 + write, log_sum, mask=row < padded_len)
    dot = tl.sum(o * g, 1)
    length = tl.sqrt(tl.sum(g * g, 1))
    extra = tl.zeros([ROWS], tl.float32)
    if GRAD_LSE:
        extra = tl.load(grad_lse + read, mask=inside, other=0.0)
    tl.store(delta + write, dot - extra, mask=row < padded_len)
    tl.store(norm + write, length, mask=row < padded_len)


@triton.jit
def _query_kernel(
    q_source, q_stride_b, q_stride_h, q_stride_n,
    k_source, k_stride_b, k_stride_h, k_stride_n,
    v_source, v_stride_b, v_stride_h, v_stride_n,
    g_source, g_stride_b, g_stride_h, g_stride_n,
    grad_q, dq_stride_b, dq_stride_h, dq_stride_n,
    lse2, delta,
    counts, c_stride_b, c_stride_p, c_stride_i,
    indices, i_stride_b, i_stride_p, i_stride_i,
    block_bias, b_stride_b, b_stride_p, b_stride_i,
    key_lengths, offsets, documents, bounds,
    q_len, kv_len, padded_len, offset, scale, scale2, num_heads, query_tiles,
    GROUP: tl.constexpr, HEADS_PER_PATTERN: tl.constexpr, PACK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
    DOCUMENTS: tl.constexpr, EVEN_KEYS: tl.constexpr,
    TMA_Q: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile."""
    query_tile = query_tiles - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    head = tl.program_id(1) * PACK
    batch = tl.program_id(2)
    kv_head = head // GROUP
    shared = head // HEADS_PER_PATTERN
    first = query_tile * ROWS
    block = first // BLOCK_Q
    batch64 = tl.cast(batch, tl.int64)
    shared64 = tl.cast(shared, tl.int64)
    block64 = tl.cast(block, tl.int64)
    count = tl.load(counts + batch64 * c_stride_b + shared64 * c_stride_p + block64 * c_stride_i)
    entries = indices + batch64 * i_stride_b + shared64 * i_stride_p + block64 * i_stride_i
    if BIAS:
        biases = block_bias + batch64 * b_stride_b + shared64 * b_stride_p + block64 * b_stride_i
    if OFFSETS:
        offset = tl.load(offsets + batch).to(tl.int32)
    key_limit = kv_len
    if LENGTHS:
        key_limit = tl.minimum(tl.load(key_lengths + batch).to(tl.int32), kv_len)
    low = 0
    full = count
    if CAUSAL or LENGTHS or DOCUMENTS or not EVEN_KEYS:
        unmasked_end = key_limit
        if CAUSAL:
            unmasked_end = tl.minimum(unmasked_end, first + offset + 1)
        if DOCUMENTS:
            last = tl.minimum(first + ROWS, q_len) - 1
            start, end = _document_of(documents, bounds, batch, first, last, q_len)
            unmasked_end = tl.minimum(unmasked_end, end)
            low = _count_below(entries, count, 1, BLOCK_K, start)
        full = _count_below(entries, count, 1, BLOCK_K, unmasked_end - BLOCK_K + 1)
        full = tl.maximum(full, low)
    q = _load_rows(
        q_source, q_stride_b, q_stride_h, q_stride_n, batch, head, first, q_len,
        PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    g = _load_rows(
        g_source, g_stride_b, g_stride_h, g_stride_n, batch, head, first, q_len,
        PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    row = first + tl.arange(0, PACK * ROWS) % ROWS
    of_row = head + tl.arange(0, PACK * ROWS) // ROWS
    place = (batch64 * num_heads + of_row) * padded_len + row
    log_sum = tl.load(lse2 + place)
    centre = tl.load(delta + place)
    acc = tl.zeros([PACK * ROWS, D], tl.float32)
    PARTS: tl.constexpr = BLOCK_K // COLUMNS
    upcoming = tl.load(entries + low, mask=low < full, other=0)
    for step in tl.range(low * PARTS, full * PARTS, num_stages=STAGES):
        slot = step // PARTS
        start = upcoming * BLOCK_K + (step % PARTS) * COLUMNS
        following = (step + 1) // PARTS
        upcoming = tl.load(entries + following, mask=following < full, other=0)
        k = _load_rows(
            k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
            1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
        )  # fmt: skip
        v = _load_rows(
            v_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
            1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
        )  # fmt: skip
        bias = 0.0
        if BIAS:
            bias = tl.load(biases + slot) * LOG2E
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(s * scale2 + (bias - log_sum)[:, None])
        ds = (p * (dp - centre[:, None])).to(k.dtype)
        acc = tl.dot(ds, k, acc, input_precision=PRECISION)
    if CAUSAL or LENGTHS or DOCUMENTS or not EVEN_KEYS:
        for step in tl.range(0, (count - (full - low)) * PARTS, num_stages=1):
            slot = step // PARTS
            slot = tl.where(slot < low, slot, slot + full - low)
            start = tl.load(entries + slot) * BLOCK_K + (step % PARTS) * COLUMNS
            column = start + tl.arange(0, COLUMNS)
            k = _load_rows(
                k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
                1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
            )  # fmt: skip
            k = _without_padding(k, column, key_limit)
            v = _load_rows(
                v_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
                1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
            )  # fmt: skip
            v = _without_padding(v, column, key_limit)
            bias = 0.0
            if BIAS:
                bias = tl.load(biases + slot) * LOG2E
            ok = _visible(
                row[:, None], column[None, :], batch, key_limit, offset, documents, q_len,
                CAUSAL, DOCUMENTS,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            p = tl.where(ok, tl.exp2(s * scale2 + (bias - log_sum)[:, None]), 0.0)
            ds = (p * (dp - centre[:, None])).to(k.dtype)
            acc = tl.dot(ds, k, acc, input_precision=PRECISION)
    _store_rows(
        grad_q, dq_stride_b, dq_stride_h, dq_stride_n, batch, head, first, q_len, acc * scale,
        PACK, ROWS, D, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _key_tile(
    dk,
    dv,
    k,
    v,
    q_source,
    g_source,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    g_stride_b,
    g_stride_h,
    g_stride_n,
    lse2,
    delta,
    norm,
    grad_logits,
    grad_bias,
    mass,
    batch,
    head,
    first,
    entry,
    plane,
    place_logits,
    bias,
    q_len,
    padded_len,
    num_heads,
    scale2,
    column,
    key_limit,
    offset,
    documents,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    MASS: tl.constexpr,
    KEEP: tl.constexpr,
    TMA_Q: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one query tile to dK and dV. Logits stand transposed, ``(m, n)``."""
    q = _load_rows(
        q_source, q_stride_b, q_stride_h, q_stride_n, batch, head, first, q_len,
        PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    g = _load_rows(
        g_source, g_stride_b, g_stride_h, g_stride_n, batch, head, first, q_len,
        PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    lane = tl.arange(0, PACK * ROWS)
    row = first + lane % ROWS
    place = (tl.cast(batch, tl.int64) * num_heads + head + lane // ROWS) * padded_len + row
    log_sum = tl.load(lse2 + place)
    centre = tl.load(delta + place)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = tl.exp2(s * scale2 + (bias - log_sum)[None, :])
    if MASKED:
        ok = _visible(
            row[None, :], column[:, None], batch, key_limit, offset, documents, q_len,
            CAUSAL, DOCUMENTS,
        )  # fmt: skip
        p = tl.where(ok, p, 0.0)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    ds = p * (dp - centre[None, :])
    if MASS:
        weight = tl.load(norm + place)
        tl.store(mass + plane + entry, tl.sum(tl.sum(p * weight[None, :], 1), 0))
    if GRAD_BIAS:
        tl.store(grad_bias + plane + entry, tl.sum(tl.sum(ds, 1), 0))
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if KEEP:
        grad_logits.store(place_logits, ds.to(grad_logits.dtype))
    return dk, dv


@triton.jit
def _key_kernel(
    q_source, q_stride_b, q_stride_h, q_stride_n,
    k_source, k_stride_b, k_stride_h, k_stride_n,
    v_source, v_stride_b, v_stride_h, v_stride_n,
    g_source, g_stride_b, g_stride_h, g_stride_n,
    grad_logits,
    grad_k, dk_stride_b, dk_stride_h, dk_stride_n,
    grad_v, dv_stride_b, dv_stride_h, dv_stride_n,
    lse2, delta, norm, grad_bias, mass,
    starts, t_stride_b, t_stride_p,
    slots, s_stride_b, s_stride_p,
    block_bias, b_stride_b, b_stride_p, b_stride_i,
    key_lengths, offsets, documents, bounds,
    q_len, kv_len, padded_len, offset, scale, scale2, num_heads, first_plane, query_blocks, width,
    GROUP: tl.constexpr, HEADS_PER_PATTERN: tl.constexpr, PACK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
    DOCUMENTS: tl.constexpr, EVEN_KEYS: tl.constexpr,
    GRAD_BIAS: tl.constexpr, MASS: tl.constexpr, KEEP: tl.constexpr,
    TMA_Q: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key tile, its share of the by-products and, if kept, of dS."""
    key_tile = tl.program_id(0)
    num_kv_heads = num_heads // GROUP
    batch = (first_plane + tl.program_id(1)) // num_kv_heads
    kv_head = (first_plane + tl.program_id(1)) % num_kv_heads
    start = key_tile * COLUMNS
    block = start // BLOCK_K
    batch64 = tl.cast(batch, tl.int64)
    if OFFSETS:
        offset = tl.load(offsets + batch).to(tl.int32)
    key_limit = kv_len
    if LENGTHS:
        key_limit = tl.minimum(tl.load(key_lengths + batch).to(tl.int32), kv_len)
    column = start + tl.arange(0, COLUMNS)
    k = _load_rows(
        k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    v = _load_rows(
        v_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    if LENGTHS:
        k = _without_padding(k, column, key_limit)
        v = _without_padding(v, column, key_limit)
    # Queries [row_low, row_end) see all these keys.
    row_low = 0
    row_end = query_blocks * BLOCK_Q
    if CAUSAL:
        row_low = start + COLUMNS - 1 - offset
    if DOCUMENTS:
        last = tl.minimum(start + COLUMNS, kv_len) - 1
        document_start, document_end = _document_of(documents, bounds, batch, start, last, q_len)
        row_low = tl.maximum(row_low, document_start)
        row_end = document_end
    if LENGTHS or not EVEN_KEYS:
        row_end = tl.where(start + COLUMNS <= key_limit, row_end, 0)
    dk = tl.zeros([COLUMNS, D], tl.float32)
    dv = tl.zeros([COLUMNS, D], tl.float32)
    PARTS: tl.constexpr = BLOCK_Q // ROWS
    KEY_PARTS: tl.constexpr = BLOCK_K // COLUMNS
    cells = tl.cast(query_blocks, tl.int64) * width
    for member in tl.range(0, GROUP // PACK):
        head = kv_head * GROUP + member * PACK
        shared64 = tl.cast(head // HEADS_PER_PATTERN, tl.int64)
        ends = starts + batch64 * t_stride_b + shared64 * t_stride_p + block
        begin = tl.load(ends)
        count = tl.load(ends + 1) - begin
        entries = slots + batch64 * s_stride_b + shared64 * s_stride_p + begin
        if BIAS:
            biases = block_bias + batch64 * b_stride_b + shared64 * b_stride_p
        # One plane of by-products for each program that visits the same tile.
        plane_of = (batch64 * num_heads + head) // PACK * (PARTS * KEY_PARTS)
        plane_of += (key_tile % KEY_PARTS) * PARTS
        # The workspace holds dS of the launched planes only.
        kept = (tl.program_id(1) * (GROUP // PACK) + member) * query_blocks * width
        low = 0
        full = count
        if CAUSAL or LENGTHS or DOCUMENTS or not EVEN_KEYS:
            low = _count_below(entries, count, width, BLOCK_Q, row_low)
            full = _count_below(entries, count, width, BLOCK_Q, row_end - BLOCK_Q + 1)
            full = tl.maximum(full, low)
        upcoming = tl.load(entries + low, mask=low < full, other=0)
        for step in tl.range(low * PARTS, full * PARTS, num_stages=STAGES):
            entry = upcoming
            following = (step + 1) // PARTS
            upcoming = tl.load(entries + following, mask=following < full, other=0)
            block_q = entry // width
            first = block_q * BLOCK_Q + (step % PARTS) * ROWS
            bias = 0.0
            if BIAS:
                bias = tl.load(biases + block_q.to(tl.int64) * b_stride_i + entry % width) * LOG2E
            dk, dv = _key_tile(
                dk, dv, k, v, q_source, g_source,
                q_stride_b, q_stride_h, q_stride_n, g_stride_b, g_stride_h, g_stride_n,
                lse2, delta, norm, grad_logits, grad_bias, mass,
                batch, head, first, entry, (plane_of + step % PARTS) * cells,
                [(kept + entry) * BLOCK_K + start % BLOCK_K, step % PARTS * (PACK * ROWS)],
                bias, q_len, padded_len, num_heads, scale2, column, key_limit, offset, documents,
                PACK, ROWS, D, HEAD_DIM, CAUSAL, DOCUMENTS, False,
                GRAD_BIAS, MASS, KEEP, TMA_Q, UPCAST, PRECISION,
            )  # fmt: skip
        if CAUSAL or LENGTHS or DOCUMENTS or not EVEN_KEYS:
            for step in tl.range(0, (count - (full - low)) * PARTS, num_stages=1):
                place = step // PARTS
                place = tl.where(place < low, place, place + full - low)
                entry = tl.load(entries + place)
                block_q = entry // width
                first = block_q * BLOCK_Q + (step % PARTS) * ROWS
                bias = 0.0
                if BIAS:
                    at = block_q.to(tl.int64) * b_stride_i + entry % width
                    bias = tl.load(biases + at) * LOG2E
                dk, dv = _key_tile(
                    dk, dv, k, v, q_source, g_source,
                    q_stride_b, q_stride_h, q_stride_n, g_stride_b, g_stride_h, g_stride_n,
                    lse2, delta, norm, grad_logits, grad_bias, mass,
                    batch, head, first, entry, (plane_of + step % PARTS) * cells,
                    [(kept + entry) * BLOCK_K + start % BLOCK_K, step % PARTS * (PACK * ROWS)],
                    bias, q_len, padded_len, num_heads, scale2, column, key_limit, offset,
                    documents,
                    PACK, ROWS, D, HEAD_DIM, CAUSAL, DOCUMENTS, True,
                    GRAD_BIAS, MASS, KEEP, TMA_Q, UPCAST, PRECISION,
                )  # fmt: skip
    _store_rows(
        grad_k, dk_stride_b, dk_stride_h, dk_stride_n, batch, kv_head, start, kv_len, dk * scale,
        1, COLUMNS, D, HEAD_DIM,
    )  # fmt: skip
    _store_rows(
        grad_v, dv_stride_b, dv_stride_h, dv_stride_n, batch, kv_head, start, kv_len, dv,
        1, COLUMNS, D, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _kept_query_kernel(
    grad_logits,
    k_source, k_stride_b, k_stride_h, k_stride_n,
    grad_q, dq_stride_b, dq_stride_h, dq_stride_n,
    counts, c_stride_b, c_stride_p, c_stride_i,
    indices, i_stride_b, i_stride_p, i_stride_i,
    key_lengths,
    q_len, kv_len, scale, num_heads, first_pack, query_blocks, width,
    GROUP: tl.constexpr, HEADS_PER_PATTERN: tl.constexpr, PACK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, LENGTHS: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile from the kept dS."""
    first = tl.program_id(0) * ROWS
    head = (first_pack + tl.program_id(1)) * PACK
    batch = head // num_heads
    head = head % num_heads
    kv_head = head // GROUP
    block = first // BLOCK_Q
    batch64 = tl.cast(batch, tl.int64)
    shared64 = tl.cast(head // HEADS_PER_PATTERN, tl.int64)
    block64 = tl.cast(block, tl.int64)
    count = tl.load(counts + batch64 * c_stride_b + shared64 * c_stride_p + block64 * c_stride_i)
    entries = indices + batch64 * i_stride_b + shared64 * i_stride_p + block64 * i_stride_i
    kept = (tl.program_id(1) * query_blocks + block) * width
    side = (first % BLOCK_Q) * PACK
    full = count
    if LENGTHS:
        key_limit = tl.minimum(tl.load(key_lengths + batch).to(tl.int32), kv_len)
        full = _count_below(entries, count, 1, BLOCK_K, key_limit - BLOCK_K + 1)
    acc = tl.zeros([PACK * ROWS, D], tl.float32)
    PARTS: tl.constexpr = BLOCK_K // COLUMNS
    upcoming = tl.load(entries, mask=full > 0, other=0)
    for step in tl.range(0, full * PARTS, num_stages=STAGES):
        start = upcoming * BLOCK_K + (step % PARTS) * COLUMNS
        following = (step + 1) // PARTS
        upcoming = tl.load(entries + following, mask=following < full, other=0)
        k = _load_rows(
            k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
            1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
        )  # fmt: skip
        ds = grad_logits.load([kept * BLOCK_K + step * COLUMNS, side]).to(k.dtype)
        acc = tl.dot(tl.trans(ds), k, acc)
    if LENGTHS:
        for step in tl.range(full * PARTS, count * PARTS, num_stages=1):
            start = tl.load(entries + step // PARTS) * BLOCK_K + (step % PARTS) * COLUMNS
            k = _load_rows(
                k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
                1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
            )  # fmt: skip
            k = _without_padding(k, start + tl.arange(0, COLUMNS), key_limit)
            ds = grad_logits.load([kept * BLOCK_K + step * COLUMNS, side]).to(k.dtype)
            acc = tl.dot(tl.trans(ds), k, acc)
    _store_rows(
        grad_q, dq_stride_b, dq_stride_h, dq_stride_n, batch, head, first, q_len, acc * scale,
        PACK, ROWS, D, HEAD_DIM,
    )  # fmt: skip


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` was set when this file was imported: kernels run on the CPU."""


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        rows: Query tokens of each packed head in a tile.
        columns: Key tokens in a tile.
        num_warps: Warps of a program.
        num_stages: Tiles in flight from memory.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, eq=False)
class Call:
    """What the forward and the backward launchers share.

    Attributes:
        query: ``(b, n, h, d)``, like ``key`` and ``value`` with any strides but 1 for ``d``.
        key: ``(b, m, g, d)``.
        value: ``(b, m, g, d)``.
        counts: ``(b, p, i)`` int32.
        indices: ``(b, p, i, k)`` int32.
        block_bias: ``(b, p, i, k)`` float32 or None.
        key_lengths: ``(b,)`` or None.
        query_offset: ``(b,)`` or None: then ``offset`` counts.
        document_ids: ``(b, n)`` int32 or None.
        document_bounds: ``(b, 2, n)`` int32: start and end of each token's document, or None.
        block_q: Tokens per query block.
        block_k: Tokens per key block.
        causal: Whether later keys are hidden.
        offset: Key position of query 0.
        scale: Factor of the logits, not negative.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    counts: Tensor
    indices: Tensor
    block_bias: Tensor | None
    key_lengths: Tensor | None
    query_offset: Tensor | None
    document_ids: Tensor | None
    document_bounds: Tensor | None
    block_q: int
    block_k: int
    causal: bool
    offset: int
    scale: float

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def heads_per_pattern(self) -> int:
        """Query heads that share one list of tiles."""
        return self.query.shape[2] // self.counts.shape[1]

    @property
    def padded_head_dim(self) -> int:
        """The power of two that a tile's last dimension takes."""
        return max(16, triton.next_power_of_2(self.query.shape[3]))

    def pack(self, rows: int, limit: int) -> int:
        """Heads that one tile holds: a power of two that divides those sharing keys and list."""
        shared = min(self.group, self.heads_per_pattern)
        pack = 1
        while shared % (2 * pack) == 0 and 2 * pack * rows <= limit:
            pack *= 2
        return pack

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments that all kernels share."""
        full_precision = torch.get_float32_matmul_precision() == "highest"
        return {
            "GROUP": self.group,
            "HEADS_PER_PATTERN": self.heads_per_pattern,
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "D": self.padded_head_dim,
            "HEAD_DIM": self.query.shape[3],
            "CAUSAL": self.causal,
            "BIAS": self.block_bias is not None,
            "LENGTHS": self.key_lengths is not None,
            "OFFSETS": self.causal and self.query_offset is not None,
            "DOCUMENTS": self.document_ids is not None,
            "EVEN_KEYS": self.key.shape[1] % self.block_k == 0,
            "UPCAST": INTERPRETED,
            "PRECISION": "ieee" if full_precision else "tf32",
        }

    def mask_arguments(self) -> tuple[Any, ...]:
        """Block bias with its strides and the tensors of the token rule; unused ones stand in."""
        stand_in = self.counts
        bias = self.block_bias
        return (
            *((stand_in, 0, 0, 0) if bias is None else (bias, *bias.stride()[:3])),
            stand_in if self.key_lengths is None else self.key_lengths,
            stand_in if self.query_offset is None else self.query_offset,
            stand_in if self.document_ids is None else self.document_ids,
            stand_in if self.document_bounds is None else self.document_bounds,
        )


def forward_config(call: Call) -> LaunchConfig:
    """The measured launch of the forward kernel."""
    d = call.padded_head_dim
    if call.query.dtype == torch.float32:
        return LaunchConfig(min(call.block_q, 64), min(call.block_k, 32), 4, 1)
    rows = min(call.block_q, 128 if d <= 128 else 64)
    columns = min(call.block_k, 128 if d <= 64 else 64)
    return LaunchConfig(rows, columns, 8 if rows > 64 else 4, 3 if d <= 128 else 2)


def query_config(call: Call) -> LaunchConfig:
    """The measured launch of the dQ kernel."""
    d = call.padded_head_dim
    if call.query.dtype == torch.float32:
        return LaunchConfig(min(call.block_q, 32), min(call.block_k, 32), 4, 1)
    rows = min(call.block_q, 128 if d <= 128 else 64)
    columns = min(call.block_k, 64 if d <= 128 else 32)
    return LaunchConfig(rows, columns, 8 if rows > 64 or d > 128 else 4, 2)


def key_config(call: Call) -> LaunchConfig:
    """The measured launch of the dK, dV kernel."""
    d = call.padded_head_dim
    if call.query.dtype == torch.float32:
        return LaunchConfig(min(call.block_q, 32), min(call.block_k, 32), 4, 1)
    rows = min(call.block_q, 64 if d <= 128 else 32)
    columns = min(call.block_k, 128 if d <= 128 else 64)
    return LaunchConfig(rows, columns, 8 if columns > 64 or d > 128 else 4, 2 if d <= 128 else 1)


def kept_query_config(call: Call, rows: int) -> LaunchConfig:
    """The measured launch of the dQ kernel that reads dS, for the rows of the dK, dV kernel."""
    return LaunchConfig(rows, min(call.block_k, 64), 4, 3)


WORKSPACE_BYTES = 2**30
"""Memory for kept dS; heads are processed in chunks that fit it."""


def planes_per_chunk(call: Call) -> int:
    """How many (sample, KV head) pairs keep their dS at a time; 0: it is recomputed.

    Needs the bulk copy engine of compute capability 9.0 and 16-bit inputs: dS is rounded to their
    type for the matrix units anyway, so that keeping it loses nothing.
    """
    if call.query.dtype == torch.float32 or call.indices.shape[3] == 0:
        return 0
    if not INTERPRETED and _capability(call.query.device) < (9, 0):
        return 0
    cells = call.indices.shape[2] * call.indices.shape[3] * call.block_q * call.block_k
    planes = call.query.shape[0] * call.key.shape[2]
    fitting = min(WORKSPACE_BYTES // (2 * cells * call.group), planes)
    return 0 if fitting == 0 else triton.cdiv(planes, triton.cdiv(planes, fitting))


def launch_forward(
    call: Call, out: Tensor, lse: Tensor, config: LaunchConfig | None = None
) -> None:
    """Writes the output ``(b, n, h, d)`` and the lse ``(b, h, n)``, both preallocated."""
    if out.numel() == 0:
        return
    config = config or forward_config(call)
    batch, q_len, num_heads, _ = call.query.shape
    pack = call.pack(config.rows, 64)
    tiles = triton.cdiv(q_len, config.rows)
    query, tma_q = _source(call.query, pack, config.rows, call)
    key, tma_k = _source(call.key, 1, config.columns, call)
    value, tma_v = _source(call.value, 1, config.columns, call)
    tma = tma_k and tma_v
    with _on(call.query.device):
        _forward_kernel[(tiles, num_heads // pack, batch)](
            query if tma_q else call.query, *_strides(call.query),
            key if tma else call.key, *_strides(call.key),
            value if tma else call.value, *_strides(call.value),
            out, *_strides(out), lse,
            call.counts, *call.counts.stride(),
            call.indices, *call.indices.stride()[:3],
            *call.mask_arguments(),
            q_len, call.key.shape[1], call.offset, call.scale * LOG2E.value, num_heads, tiles,
            **call.constants(), PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
            TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Gradients:
    """Preallocated results of the backward pass.

    Attributes:
        query: ``(b, n, h, d)``.
        key: ``(b, m, g, d)``.
        value: ``(b, m, g, d)``.
        block_bias: ``(b, p, i, k)`` float32 or None.
        mass: ``(b, p, i, k)`` or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    block_bias: Tensor | None
    mass: Tensor | None


def launch_backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    starts: Tensor,
    slots: Tensor,
    grads: Gradients,
    *,
    chunk: int | None = None,
    config: LaunchConfig | None = None,
    config_query: LaunchConfig | None = None,
) -> None:
    """Writes all gradients.

    Args:
        call: As in the forward pass.
        out: Its output.
        lse: Its lse.
        grad_out: Gradient of the output; last dimension contiguous.
        grad_lse: Gradient of the lse, contiguous, or None.
        starts: ``PatternTranspose.offsets``.
        slots: ``PatternTranspose.slots``.
        grads: Where to write.
        chunk: (sample, KV head) pairs that keep dS at a time, 0: none; None:
            :func:`planes_per_chunk`.
        config: Launch of the dK, dV kernel.
        config_query: Launch of the dQ kernel.
    """
    batch, q_len, num_heads, head_dim = call.query.shape
    kv_len, num_kv_heads = call.key.shape[1:3]
    if q_len == 0 or kv_len == 0 or batch == 0:
        for tensor in (grads.query, grads.key, grads.value, grads.block_bias, grads.mass):
            if tensor is not None:
                tensor.zero_()
        return
    chunk = planes_per_chunk(call) if chunk is None else chunk
    config = config or key_config(call)
    d = call.padded_head_dim
    query_blocks, width = call.indices.shape[2:]
    padded_len = query_blocks * call.block_q
    pack = call.pack(config.rows, 64)
    query, tma_q = _source(call.query, pack, config.rows, call)
    gradient, tma_g = _source(grad_out, pack, config.rows, call)
    key, tma_k = _source(call.key, 1, config.columns, call)
    value, tma_v = _source(call.value, 1, config.columns, call)
    tma, tma_q = tma_k and tma_v, tma_q and tma_g
    device = call.query.device

    def per_row() -> Tensor:
        return torch.empty(batch, num_heads, padded_len, dtype=torch.float32, device=device)

    lse2, delta, norm = per_row(), per_row(), per_row()
    constants = call.constants()
    with _on(device):
        _row_kernel[(triton.cdiv(padded_len, 32), num_heads, batch)](
            out, *_strides(out), grad_out, *_strides(grad_out),
            lse, lse if grad_lse is None else grad_lse, lse2, delta, norm,
            q_len, padded_len, num_heads,
            ROWS=32, D=d, HEAD_DIM=head_dim, GRAD_LSE=grad_lse is not None, num_warps=4,
        )  # fmt: skip
        parts = (call.block_q // config.rows) * (call.block_k // config.columns)
        planes = num_heads // pack * parts

        def by_product(wanted: Tensor | None) -> Tensor:
            if wanted is None:
                return norm
            return torch.zeros(
                batch, planes, query_blocks, width, dtype=torch.float32, device=device
            )

        grad_bias, mass = by_product(grads.block_bias), by_product(grads.mass)
        planes_kv = batch * num_kv_heads
        kept: Any = norm
        if chunk:
            packs = call.group // pack
            rows = chunk * packs * query_blocks * width * call.block_k
            workspace = torch.empty(
                rows, pack * call.block_q, dtype=call.query.dtype, device=device
            )
            box = [config.columns, pack * config.rows]
            kept = TensorDescriptor.from_tensor(workspace, box)
        for plane in range(0, planes_kv, chunk or planes_kv):
            current = min(chunk or planes_kv, planes_kv - plane)
            _key_kernel[(triton.cdiv(kv_len, config.columns), current)](
                query if tma_q else call.query, *_strides(call.query),
                key if tma else call.key, *_strides(call.key),
                value if tma else call.value, *_strides(call.value),
                gradient if tma_q else grad_out, *_strides(grad_out),
                kept,
                grads.key, *_strides(grads.key), grads.value, *_strides(grads.value),
                lse2, delta, norm, grad_bias, mass,
                starts, *starts.stride()[:2], slots, *slots.stride()[:2],
                *call.mask_arguments(),
                q_len, kv_len, padded_len, call.offset, call.scale, call.scale * LOG2E.value,
                num_heads, plane, query_blocks, width,
                **constants, PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
                GRAD_BIAS=grads.block_bias is not None, MASS=grads.mass is not None,
                KEEP=chunk > 0, TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            if chunk:
                _launch_kept_query(
                    call, workspace, pack, plane, current, grads.query, config.rows, config_query
                )
        if not chunk:
            _launch_query(call, grad_out, lse2, delta, grads.query, config_query)
    _collect(call, grads, grad_bias, mass, norm)


def _launch_query(
    call: Call,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    grad_q: Tensor,
    config: LaunchConfig | None,
) -> None:
    config = config or query_config(call)
    batch, q_len, num_heads, _ = call.query.shape
    pack = call.pack(config.rows, 64)
    tiles = triton.cdiv(q_len, config.rows)
    query, tma_q = _source(call.query, pack, config.rows, call)
    gradient, tma_g = _source(grad_out, pack, config.rows, call)
    key, tma_k = _source(call.key, 1, config.columns, call)
    value, tma_v = _source(call.value, 1, config.columns, call)
    tma, tma_q = tma_k and tma_v, tma_q and tma_g
    _query_kernel[(tiles, num_heads // pack, batch)](
        query if tma_q else call.query, *_strides(call.query),
        key if tma else call.key, *_strides(call.key),
        value if tma else call.value, *_strides(call.value),
        gradient if tma_q else grad_out, *_strides(grad_out),
        grad_q, *_strides(grad_q), lse2, delta,
        call.counts, *call.counts.stride(),
        call.indices, *call.indices.stride()[:3],
        *call.mask_arguments(),
        q_len, call.key.shape[1], lse2.shape[2], call.offset, call.scale,
        call.scale * LOG2E.value, num_heads, tiles,
        **call.constants(), PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
        TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_kept_query(
    call: Call,
    workspace: Tensor,
    pack: int,
    plane: int,
    planes: int,
    grad_q: Tensor,
    rows: int,
    config: LaunchConfig | None,
) -> None:
    config = config or kept_query_config(call, rows)
    _, q_len, num_heads, head_dim = call.query.shape
    key, tma = _source(call.key, 1, config.columns, call)
    packs = call.group // pack
    _kept_query_kernel[(triton.cdiv(q_len, rows), planes * packs)](
        TensorDescriptor.from_tensor(workspace, [config.columns, pack * rows]),
        key if tma else call.key, *_strides(call.key),
        grad_q, *_strides(grad_q),
        call.counts, *call.counts.stride(),
        call.indices, *call.indices.stride()[:3],
        call.counts if call.key_lengths is None else call.key_lengths,
        q_len, call.key.shape[1], call.scale, num_heads, plane * packs, *call.indices.shape[2:],
        GROUP=call.group, HEADS_PER_PATTERN=call.heads_per_pattern, PACK=pack,
        BLOCK_Q=call.block_q, BLOCK_K=call.block_k, ROWS=rows, COLUMNS=config.columns,
        D=call.padded_head_dim, HEAD_DIM=head_dim, LENGTHS=call.key_lengths is not None,
        TMA=tma, UPCAST=INTERPRETED, STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _collect(call: Call, grads: Gradients, grad_bias: Tensor, mass: Tensor, norm: Tensor) -> None:
    """Adds the planes of programs that visited the same tile; normalises the mass."""
    batch, heads, blocks, width = call.indices.shape

    def add_planes(planes: Tensor) -> Tensor:
        return planes.view(batch, heads, -1, blocks, width).sum(2)

    if grads.block_bias is not None:
        grads.block_bias.copy_(add_planes(grad_bias))
    if grads.mass is not None:
        rows = norm.view(batch, heads, -1, blocks, call.block_q).sum((2, 4))
        tiny = torch.finfo(torch.float32).tiny
        grads.mass.copy_(add_planes(mass) / rows.clamp(min=tiny)[..., None])


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of ``(b, n, h, d)``."""
    return x.stride(0), x.stride(2), x.stride(1)


def _source(x: Tensor, heads: int, count: int, call: Call) -> tuple[Any, bool]:
    """A tensor descriptor for boxes of ``count`` tokens, if the hardware takes this layout."""
    unit = 16 // x.element_size()
    strides = [x.stride(0), x.stride(2), x.stride(1)]
    shape = [x.shape[0], x.shape[2], x.shape[1]]
    # The stride of a dimension of one element is never used, but still checked.
    strides = [unit if size == 1 else step for size, step in zip(shape, strides, strict=True)]
    fits = all(step > 0 and step % unit == 0 for step in strides) and x.numel() > 0
    hardware = INTERPRETED or _capability(x.device) >= (9, 0)
    if not hardware or not fits or x.data_ptr() % 16:
        return x, False
    box = [1, heads, count, call.padded_head_dim]
    return TensorDescriptor(x, [*shape, x.shape[3]], [*strides, 1], box), True


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _on(device: torch.device) -> Any:
    """Kernels launch on the current device: makes it the tensors' one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
