"""What each tile tells the selector: its mass and the gradient of its bias; Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import (
    LOG2E,
    count_below,
    load_rows,
)


@triton.jit
def store_parts(target, place, per_row, PARTS: tl.constexpr):
    """Stores the sum over a tile's rows, as one part per warp where every warp has its own rows.

    Warps that add up one number wait for each other. The addresses run along the lanes, of which
    the first stores: so the layout gives every warp its own part, and handing the parts over takes
    neither shared memory nor a barrier.
    """
    if PARTS == 1:
        tl.store(target + place, tl.sum(per_row, 0))
    else:
        parts = tl.sum(tl.reshape(per_row, [PARTS, per_row.shape[0] // PARTS]), 1)
        lane = tl.arange(0, 32)[None, :]
        spread = tl.broadcast_to(parts[:, None], [PARTS, 32])
        tl.store(target + place * PARTS + tl.arange(0, PARTS)[:, None] + lane, spread, lane == 0)


@triton.jit
def store_by_products(
    mass,
    grad_bias,
    place,
    p,
    ds,
    weight,
    MASS: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What a visited tile says about its score."""
    if MASS:
        store_parts(mass, place, tl.sum(p, 1) * weight, PARTS)
    if GRAD_BIAS:
        store_parts(grad_bias, place, tl.sum(ds, 1), PARTS)


@triton.jit
def mass_kernel(
    q_source, q_stride_b, q_stride_h, q_stride_n,
    k_source, k_stride_b, k_stride_h, k_stride_n,
    g_source, g_stride_b, g_stride_h, g_stride_n,
    lse, norm, mass,
    counts, c_stride_b, c_stride_p, c_stride_i,
    indices, i_stride_b, i_stride_p, i_stride_i,
    q_len, kv_len, scale2, num_heads, query_tiles, query_blocks, width,
    GROUP: tl.constexpr, HEADS_PER_PATTERN: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, PARTS: tl.constexpr, TMA_Q: tl.constexpr, TMA: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mass of the tiles of some rows of one head, one product each, and the rows' gradient norms.

    For whole blocks, as many queries as keys where ``CAUSAL``, and no other mask.
    """
    query_tile = query_tiles - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    shared = head // HEADS_PER_PATTERN
    first = query_tile * ROWS
    block = first // BLOCK
    batch64 = tl.cast(batch, tl.int64)
    shared64 = tl.cast(shared, tl.int64)
    block64 = tl.cast(block, tl.int64)
    count = tl.load(counts + batch64 * c_stride_b + shared64 * c_stride_p + block64 * c_stride_i)
    entries = indices + batch64 * i_stride_b + shared64 * i_stride_p + block64 * i_stride_i
    full = count
    if CAUSAL:
        full = count_below(entries, count, 1, 1, block)
    g = load_rows(
        g_source, g_stride_b, g_stride_h, g_stride_n, batch, head, first, q_len,
        1, ROWS, D, HEAD_DIM, TMA_Q, True,
    )  # fmt: skip
    row = first + tl.arange(0, ROWS)
    place = (batch64 * num_heads + head) * q_len + row
    log_sum = tl.load(lse + place)
    # Whatever gradient arrives at a row that reads nothing.
    weight = tl.where(log_sum == float("-inf"), 0.0, tl.sqrt(tl.sum(g * g, 1)))
    tl.store(norm + place, weight)
    # +inf makes exp2(s - lse) zero: rows that read nothing cost no mask.
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2E)
    q = load_rows(
        q_source, q_stride_b, q_stride_h, q_stride_n, batch, head, first, q_len,
        1, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    VISITS: tl.constexpr = BLOCK // COLUMNS
    plane = (batch64 * num_heads + head) * (BLOCK // ROWS) + first % BLOCK // ROWS
    cells = tl.cast(query_blocks, tl.int64) * width
    own = plane * VISITS * cells + block64 * width
    kv_head = head // GROUP
    upcoming = tl.load(entries, mask=full > 0, other=0)
    for step in tl.range(0, full * VISITS, num_stages=STAGES):
        slot = step // VISITS
        start = upcoming * BLOCK + (step % VISITS) * COLUMNS
        following = (step + 1) // VISITS
        upcoming = tl.load(entries + following, mask=following < full, other=0)
        k = load_rows(
            k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
            1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(s * scale2 - log_sum[:, None])
        store_parts(mass, own + step % VISITS * cells + slot, tl.sum(p, 1) * weight, PARTS)
    if CAUSAL:
        for step in tl.range(full * VISITS, count * VISITS, num_stages=1):
            slot = step // VISITS
            start = tl.load(entries + slot) * BLOCK + (step % VISITS) * COLUMNS
            k = load_rows(
                k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
                1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            seen = start + tl.arange(0, COLUMNS)[None, :] <= row[:, None]
            p = tl.where(seen, tl.exp2(s * scale2 - log_sum[:, None]), 0.0)
            store_parts(mass, own + step % VISITS * cells + slot, tl.sum(p, 1) * weight, PARTS)


@triton.jit
def collect_kernel(
    parts, norm, target, counts, c_stride_b, c_stride_p, c_stride_i,
    pattern_heads, num_heads, query_blocks, width, planes, q_len, padded_len,
    HEADS_PER_PATTERN: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
    COLUMN_VISITS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of one row of tiles; with ``SHARE`` relative to its gradient norms."""
    block = tl.program_id(0)
    batch = tl.program_id(1) // pattern_heads
    shared = tl.program_id(1) % pattern_heads
    count = tl.load(
        counts + tl.cast(batch, tl.int64) * c_stride_b + tl.cast(shared, tl.int64) * c_stride_p
        + tl.cast(block, tl.int64) * c_stride_i
    )  # fmt: skip
    total = 1.0
    if SHARE:
        lane = tl.arange(0, BLOCK_Q)
        first = tl.cast(batch, tl.int64) * num_heads + shared * HEADS_PER_PATTERN
        norms = tl.zeros([BLOCK_Q], tl.float32)
        for head in range(HEADS_PER_PATTERN):
            row = block * BLOCK_Q + lane
            place = (first + head) * padded_len + row
            norms += tl.load(norm + place, mask=row < padded_len, other=0.0)
        # The smallest normal number: a row without gradient has no mass.
        total = tl.maximum(tl.sum(norms, 0), 1.1754943508222875e-38)
    own = tl.cast(tl.program_id(1), tl.int64)
    part = tl.arange(0, PARTS)
    for start in range(0, width, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        # Entries past the count were never written.
        used = (slot < count)[:, None] & (part < PARTS)[None, :]
        found = tl.zeros([SLOTS, PARTS], tl.float32)
        for plane in range(planes):
            # No program works on rows past the end.
            first_row = block * BLOCK_Q + plane // COLUMN_VISITS % (BLOCK_Q // ROWS) * ROWS
            cell = ((own * planes + plane) * query_blocks + block) * width + slot
            found += tl.load(
                parts + cell[:, None] * PARTS + part[None, :],
                mask=used & (first_row < q_len),
                other=0.0,
            )
        cell = (own * query_blocks + block) * width + slot
        tl.store(target + cell, tl.sum(found, 1) / total, mask=slot < width)
