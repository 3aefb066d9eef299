"""The Triton forward kernel of block-sparse attention; names as in ``triton_tiles.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import (
    LN2,
    LOG2E,
    any_left_out,
    count_below,
    document_of,
    finite_part,
    load_rows,
    store_rows,
    visible,
)


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
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax over ``COLUMNS`` keys from ``start``."""
    k = load_rows(
        key_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    v = load_rows(
        value_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        column = start + tl.arange(0, COLUMNS)
        if BIAS:
            # Nobody reads such a tile.
            key_limit = tl.where(bias == float("-inf"), 0, key_limit)
        ok = visible(
            row[:, None], column[None, :], batch, key_limit, offset, documents, q_len,
            CAUSAL, DOCUMENTS,
        )  # fmt: skip
        # After the factor, which may be 0: -inf * 0 is NaN.
        s = tl.where(ok, s * scale2 + bias, float("-inf"))
        new_high = tl.maximum(high, tl.max(s, 1))
    else:
        new_high = tl.maximum(high, tl.max(s, 1) * scale2 + bias)
    # A row that has seen nothing yet keeps -inf; 0 instead avoids -inf - -inf.
    base = tl.where(new_high == float("-inf"), 0.0, new_high)
    p = tl.exp2(s - base[:, None]) if MASKED else tl.exp2(s * scale2 + (bias - base)[:, None])
    shrink = tl.exp2(high - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if MASKED:
        # 0, or NaN for a token with a number that is not finite: for those alone that read it.
        special = tl.sum((v - v).to(tl.float32), 1)
        # Not by the weight: one that underflows to 0 is of a token that is read all the same.
        p = tl.where(s > float("-inf"), p + special[None, :], p)
        v = finite_part(v)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_high, total


@triton.jit
def forward_kernel(
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
    if CAUSAL or LENGTHS or DOCUMENTS or BIAS or not EVEN_KEYS:
        unmasked_end = key_limit
        if CAUSAL:
            unmasked_end = tl.minimum(unmasked_end, first + offset + 1)
        if DOCUMENTS:
            last = tl.minimum(first + ROWS, q_len) - 1
            start, end = document_of(documents, bounds, batch, first, last, q_len)
            unmasked_end = tl.minimum(unmasked_end, end)
            low = count_below(entries, count, 1, BLOCK_K, start)
        full = count_below(entries, count, 1, BLOCK_K, unmasked_end - BLOCK_K + 1)
        full = tl.maximum(full, low)
        if BIAS:
            full = tl.where(any_left_out(biases, count) > 0, low, full)
    q = load_rows(
        q_source, q_stride_b, q_stride_h, q_stride_n, batch, head, first, q_len,
        PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    row = first + tl.arange(0, PACK * ROWS) % ROWS
    high = tl.full([PACK * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([PACK * ROWS], tl.float32)
    acc = tl.zeros([PACK * ROWS, D], tl.float32)
    VISITS: tl.constexpr = BLOCK_K // COLUMNS
    # The list entry of the next step is fetched one step ahead: its address depends on nothing.
    upcoming = tl.load(entries + low, mask=low < full, other=0)
    for step in tl.range(low * VISITS, full * VISITS, num_stages=STAGES):
        slot = step // VISITS
        start = upcoming * BLOCK_K + (step % VISITS) * COLUMNS
        following = (step + 1) // VISITS
        upcoming = tl.load(entries + following, mask=following < full, other=0)
        bias = 0.0
        if BIAS:
            bias = tl.load(biases + slot) * LOG2E
        acc, high, total = _forward_tile(
            acc, high, total, q, k_source, v_source,
            k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
            batch, kv_head, start, kv_len, bias, scale2,
            row, key_limit, offset, documents, q_len,
            D, HEAD_DIM, COLUMNS, CAUSAL, DOCUMENTS, BIAS, False, TMA, UPCAST, PRECISION,
        )  # fmt: skip
    if CAUSAL or LENGTHS or DOCUMENTS or BIAS or not EVEN_KEYS:
        for step in tl.range(0, (count - (full - low)) * VISITS, num_stages=1):
            slot = step // VISITS
            slot = tl.where(slot < low, slot, slot + full - low)
            start = tl.load(entries + slot) * BLOCK_K + (step % VISITS) * COLUMNS
            bias = 0.0
            if BIAS:
                bias = tl.load(biases + slot) * LOG2E
            acc, high, total = _forward_tile(
                acc, high, total, q, k_source, v_source,
                k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
                batch, kv_head, start, kv_len, bias, scale2,
                row, key_limit, offset, documents, q_len,
                D, HEAD_DIM, COLUMNS, CAUSAL, DOCUMENTS, BIAS, True, TMA, UPCAST, PRECISION,
            )  # fmt: skip
    empty = high == float("-inf")
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    store_rows(
        out, o_stride_b, o_stride_h, o_stride_n, batch, head, first, q_len, acc,
        PACK, ROWS, D, HEAD_DIM,
    )  # fmt: skip
    of_row = head + tl.arange(0, PACK * ROWS) // ROWS
    place = (batch64 * num_heads + of_row) * q_len + row
    natural = tl.where(empty, float("-inf"), (high + tl.log2(total)) * LN2)
    # An infinite logit takes all the weight: not inf - inf.
    natural = tl.where(high == float("inf"), high, natural)
    tl.store(lse + place, natural, mask=row < q_len)
