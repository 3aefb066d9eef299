"""Triton kernels of block-sparse attention; ``triton_launch.py`` launches them.

Names inside the kernels: a *tile* is one kept (query block, key block) pair of the pattern. A
program works on ``ROWS`` query tokens of ``PACK`` query heads that share keys and pattern, or on
``COLUMNS`` key tokens; both divide the pattern's blocks. Logits live in base 2: the scale carries
log2(e), so that every exponential is one ``exp2``.

Gradients are deterministic without atomics: one program owns dK and dV of a key tile, another dQ
of a query tile; both recompute the logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def row_kernel(
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
def _store_parts(target, place, per_row, WARPS: tl.constexpr):
    """Stores the sum over a tile's rows as one part per warp: warps that add together wait."""
    parts = tl.sum(tl.reshape(per_row, [WARPS, per_row.shape[0] // WARPS]), 1)
    # The addresses run along the lanes, of which the first stores. So the layout gives every warp
    # its own part, and handing the parts over takes neither shared memory nor a barrier.
    lane = tl.arange(0, 32)[None, :]
    spread = tl.broadcast_to(parts[:, None], [WARPS, 32])
    tl.store(target + place * WARPS + tl.arange(0, WARPS)[:, None] + lane, spread, lane == 0)


@triton.jit
def _store_by_products(
    mass,
    grad_bias,
    place,
    p,
    ds,
    weight,
    MASS: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """What a visited tile says about its score."""
    if MASS:
        _store_parts(mass, place, tl.sum(p, 1) * weight, WARPS)
    if GRAD_BIAS:
        _store_parts(grad_bias, place, tl.sum(ds, 1), WARPS)


@triton.jit
def query_kernel(
    q_source, q_stride_b, q_stride_h, q_stride_n,
    k_source, k_stride_b, k_stride_h, k_stride_n,
    v_source, v_stride_b, v_stride_h, v_stride_n,
    g_source, g_stride_b, g_stride_h, g_stride_n,
    grad_q, dq_stride_b, dq_stride_h, dq_stride_n,
    lse2, delta, norm, grad_bias, mass,
    counts, c_stride_b, c_stride_p, c_stride_i,
    indices, i_stride_b, i_stride_p, i_stride_i,
    block_bias, b_stride_b, b_stride_p, b_stride_i,
    key_lengths, offsets, documents, bounds,
    q_len, kv_len, padded_len, offset, scale, scale2, num_heads, query_tiles,
    query_blocks, width,
    GROUP: tl.constexpr, HEADS_PER_PATTERN: tl.constexpr, PACK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
    DOCUMENTS: tl.constexpr, EVEN_KEYS: tl.constexpr,
    GRAD_Q: tl.constexpr, GRAD_BIAS: tl.constexpr, MASS: tl.constexpr, WARPS: tl.constexpr,
    TMA_Q: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile and its share of the by-products; the mass alone without ``GRAD_Q``.

    These are computed here, not beside dK and dV, because here the rows' weights stay in place.
    """
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
    if GRAD_Q:
        g = _load_rows(
            g_source, g_stride_b, g_stride_h, g_stride_n, batch, head, first, q_len,
            PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
        )  # fmt: skip
        acc = tl.zeros([PACK * ROWS, D], tl.float32)
    row = first + tl.arange(0, PACK * ROWS) % ROWS
    of_row = head + tl.arange(0, PACK * ROWS) // ROWS
    place = (batch64 * num_heads + of_row) * padded_len + row
    log_sum = tl.load(lse2 + place)
    centre = tl.load(delta + place)
    weight = tl.load(norm + place)
    PARTS: tl.constexpr = BLOCK_K // COLUMNS
    # One plane of by-products for each program and step that visits the same tile.
    plane = (batch64 * num_heads + head) // PACK * (BLOCK_Q // ROWS) + first % BLOCK_Q // ROWS
    cells = tl.cast(query_blocks, tl.int64) * width
    own = plane * PARTS * cells + block64 * width
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
        bias = 0.0
        if BIAS:
            bias = tl.load(biases + slot) * LOG2E
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(s * scale2 + (bias - log_sum)[:, None])
        if GRAD_Q:
            v = _load_rows(
                v_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
                1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
            )  # fmt: skip
            dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - centre[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
        else:
            ds = p
        _store_by_products(
            mass,
            grad_bias,
            own + step % PARTS * cells + slot,
            p,
            ds,
            weight,
            MASS,
            GRAD_BIAS,
            WARPS,
        )
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
            bias = 0.0
            if BIAS:
                bias = tl.load(biases + slot) * LOG2E
            ok = _visible(
                row[:, None], column[None, :], batch, key_limit, offset, documents, q_len,
                CAUSAL, DOCUMENTS,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.where(ok, tl.exp2(s * scale2 + (bias - log_sum)[:, None]), 0.0)
            if GRAD_Q:
                v = _load_rows(
                    v_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
                    1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
                )  # fmt: skip
                v = _without_padding(v, column, key_limit)
                dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
                ds = p * (dp - centre[:, None])
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
            else:
                ds = p
            _store_by_products(
                mass,
                grad_bias,
                own + step % PARTS * cells + slot,
                p,
                ds,
                weight,
                MASS,
                GRAD_BIAS,
                WARPS,
            )
    if GRAD_Q:
        _store_rows(
            grad_q, dq_stride_b, dq_stride_h, dq_stride_n, batch, head, first, q_len, acc * scale,
            PACK, ROWS, D, HEAD_DIM,
        )  # fmt: skip
    if OVERLAP and query_tile + tl.program_id(1) + batch == 0:
        # This kernel must not end before the one that it overlaps has.
        tl.extra.cuda.gdc_wait()


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
    batch,
    head,
    first,
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
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_kernel(
    q_source, q_stride_b, q_stride_h, q_stride_n,
    k_source, k_stride_b, k_stride_h, k_stride_n,
    v_source, v_stride_b, v_stride_h, v_stride_n,
    g_source, g_stride_b, g_stride_h, g_stride_n,
    grad_k, dk_stride_b, dk_stride_h, dk_stride_n,
    grad_v, dv_stride_b, dv_stride_h, dv_stride_n,
    lse2, delta,
    starts, t_stride_b, t_stride_p,
    slots, s_stride_b, s_stride_p,
    block_bias, b_stride_b, b_stride_p, b_stride_i,
    key_lengths, offsets, documents, bounds,
    q_len, kv_len, padded_len, offset, scale, scale2, num_heads, query_blocks, width,
    GROUP: tl.constexpr, HEADS_PER_PATTERN: tl.constexpr, PACK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
    DOCUMENTS: tl.constexpr, EVEN_KEYS: tl.constexpr,
    TMA_Q: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key tile."""
    if OVERLAP:
        # The dQ kernel needs nothing of this one: it may fill the multiprocessors that fall idle.
        tl.extra.cuda.gdc_launch_dependents()
    key_tile = tl.program_id(0)
    num_kv_heads = num_heads // GROUP
    batch = tl.program_id(1) // num_kv_heads
    kv_head = tl.program_id(1) % num_kv_heads
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
    # Heads that share one list are visited in one loop, the others one after another.
    TOGETHER: tl.constexpr = GROUP // PACK if HEADS_PER_PATTERN % GROUP == 0 else 1
    ROW_PARTS: tl.constexpr = BLOCK_Q // ROWS
    PARTS: tl.constexpr = ROW_PARTS * TOGETHER
    for member in tl.range(0, GROUP // PACK // TOGETHER):
        head = kv_head * GROUP + member * PACK
        shared64 = tl.cast(head // HEADS_PER_PATTERN, tl.int64)
        ends = starts + batch64 * t_stride_b + shared64 * t_stride_p + block
        begin = tl.load(ends)
        count = tl.load(ends + 1) - begin
        entries = slots + batch64 * s_stride_b + shared64 * s_stride_p + begin
        if BIAS:
            biases = block_bias + batch64 * b_stride_b + shared64 * b_stride_p
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
            first = block_q * BLOCK_Q + (step % ROW_PARTS) * ROWS
            bias = 0.0
            if BIAS:
                bias = tl.load(biases + block_q.to(tl.int64) * b_stride_i + entry % width) * LOG2E
            dk, dv = _key_tile(
                dk, dv, k, v, q_source, g_source,
                q_stride_b, q_stride_h, q_stride_n, g_stride_b, g_stride_h, g_stride_n,
                lse2, delta,
                batch, head + step % PARTS // ROW_PARTS * PACK, first,
                bias, q_len, padded_len, num_heads, scale2, column, key_limit, offset, documents,
                PACK, ROWS, D, HEAD_DIM, CAUSAL, DOCUMENTS, False,
                TMA_Q, UPCAST, PRECISION,
            )  # fmt: skip
        if CAUSAL or LENGTHS or DOCUMENTS or not EVEN_KEYS:
            for step in tl.range(0, (count - (full - low)) * PARTS, num_stages=1):
                place = step // PARTS
                place = tl.where(place < low, place, place + full - low)
                entry = tl.load(entries + place)
                block_q = entry // width
                first = block_q * BLOCK_Q + (step % ROW_PARTS) * ROWS
                bias = 0.0
                if BIAS:
                    at = block_q.to(tl.int64) * b_stride_i + entry % width
                    bias = tl.load(biases + at) * LOG2E
                dk, dv = _key_tile(
                    dk, dv, k, v, q_source, g_source,
                    q_stride_b, q_stride_h, q_stride_n, g_stride_b, g_stride_h, g_stride_n,
                    lse2, delta,
                    batch, head + step % PARTS // ROW_PARTS * PACK, first,
                    bias, q_len, padded_len, num_heads, scale2, column, key_limit, offset,
                    documents,
                    PACK, ROWS, D, HEAD_DIM, CAUSAL, DOCUMENTS, True,
                    TMA_Q, UPCAST, PRECISION,
                )  # fmt: skip
    _store_rows(
        grad_k, dk_stride_b, dk_stride_h, dk_stride_n, batch, kv_head, start, kv_len, dk * scale,
        1, COLUMNS, D, HEAD_DIM,
    )  # fmt: skip
    _store_rows(
        grad_v, dv_stride_b, dv_stride_h, dv_stride_n, batch, kv_head, start, kv_len, dv,
        1, COLUMNS, D, HEAD_DIM,
    )  # fmt: skip


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` was set when this file was imported: kernels run on the CPU."""
