"""The backward pass of block-sparse attention in Triton, and its operator.

From the probabilities P of a tile, recomputed with the saved lse, and the gradient g of the output:

    dP = g vᵀ,  dS = P (dP - delta)  with  delta = Σ_d g · out - dlse,
    dq = scale · dS k,  dk = scale · dSᵀ q,  dv = Pᵀ g,

and of each tile its mass ``Σ ‖g‖ P`` and the gradient ``Σ dS`` of its bias. Gradients are
deterministic without atomics: one program owns dK and dV of a key tile, another dQ of a query tile;
both recompute the logits. Names as in ``triton_tiles.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention.triton_by_products import (
    collect,
    empty_parts,
    parts_of,
    store_by_products,
)
from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import (
    Call,
    LaunchConfig,
    count_below,
    count_tiles_left_out,
    document_of,
    finite_part,
    key_config,
    load_rows,
    query_config,
    sources,
    store_rows,
    unmasked_tiles,
    visible,
)
from dilated_attention_pytorch.ops.operators import NAMESPACE
from dilated_attention_pytorch.ops.triton_device import (
    INTERPRETED,
    LOG2E,
    capability,
    on_device,
    strides,
)


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
    o = load_rows(
        out, o_stride_b, o_stride_h, o_stride_n, batch, head, first, q_len,
        1, ROWS, D, HEAD_DIM, False, True,
    )  # fmt: skip
    g = load_rows(
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
    empty = log_sum == float("-inf")
    # NaN where the gradient is not finite: the kernels take that from the products of masked tiles.
    log_sum = tl.where(empty, float("inf"), log_sum * LOG2E + tl.sum(g - g, 1))
    tl.store(lse2 + write, log_sum, mask=row < padded_len)
    dot = tl.sum(o * g, 1)
    length = tl.sqrt(tl.sum(g * g, 1))
    if GRAD_LSE:
        dot -= tl.load(grad_lse + read, mask=inside, other=0.0)
    # Whatever gradient arrives at a row that reads nothing.
    tl.store(delta + write, tl.where(empty, 0.0, dot), mask=row < padded_len)
    tl.store(norm + write, tl.where(empty, 0.0, length), mask=row < padded_len)


@triton.jit
def _query_tile(
    acc, q, g, k_source, v_source, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len, biases, slot,
    log_sum, centre, scale2, row, key_limit, offset, documents, q_len,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one key tile to dQ; also returns the tile's P and dS."""
    column = start + tl.arange(0, COLUMNS)
    k = load_rows(
        k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    bias = 0.0
    if BIAS:
        bias = tl.load(biases + slot) * LOG2E
    if MASKED:
        if BIAS:
            key_limit = tl.where(bias == float("-inf"), 0, key_limit)
        ok = visible(
            row[:, None], column[None, :], batch, key_limit, offset, documents, q_len,
            CAUSAL, DOCUMENTS,
        )  # fmt: skip
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * scale2 + (bias - log_sum)[:, None])
    if MASKED:
        p = tl.where(ok, p, 0.0)
    v = load_rows(
        v_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    if MASKED:
        ds = tl.where(p == 0, 0.0, p * (dp - centre[:, None]))
        # Where k is not finite, s is neither, nor is ds where k is read.
        k = finite_part(k)
    else:
        ds = p * (dp - centre[:, None])
    acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc, p, ds


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
    GRAD_BIAS: tl.constexpr, MASS: tl.constexpr, PARTS: tl.constexpr,
    TMA_Q: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile and its share of the by-products.

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
    biases = block_bias
    if BIAS:
        biases += batch64 * b_stride_b + shared64 * b_stride_p + block64 * b_stride_i
    if OFFSETS:
        offset = tl.load(offsets + batch).to(tl.int32)
    key_limit = kv_len
    if LENGTHS:
        key_limit = tl.minimum(tl.load(key_lengths + batch).to(tl.int32), kv_len)
    low = 0
    full = count
    if CAUSAL or LENGTHS or DOCUMENTS or BIAS or not EVEN_KEYS:
        low, full = unmasked_tiles(
            entries, biases, count, first, key_limit, offset, documents, bounds, batch, q_len,
            BLOCK_K, ROWS, CAUSAL, DOCUMENTS, BIAS,
        )  # fmt: skip
    q = load_rows(
        q_source, q_stride_b, q_stride_h, q_stride_n, batch, head, first, q_len,
        PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    g = load_rows(
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
    VISITS: tl.constexpr = BLOCK_K // COLUMNS
    # One plane of by-products for each program and step that visits the same tile.
    plane = (batch64 * num_heads + head) // PACK * (BLOCK_Q // ROWS) + first % BLOCK_Q // ROWS
    cells = tl.cast(query_blocks, tl.int64) * width
    own = plane * VISITS * cells + block64 * width
    upcoming = tl.load(entries + low, mask=low < full, other=0)
    for step in tl.range(low * VISITS, full * VISITS, num_stages=STAGES):
        slot = step // VISITS
        start = upcoming * BLOCK_K + (step % VISITS) * COLUMNS
        following = (step + 1) // VISITS
        upcoming = tl.load(entries + following, mask=following < full, other=0)
        acc, p, ds = _query_tile(
            acc, q, g, k_source, v_source, k_stride_b, k_stride_h, k_stride_n,
            v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
            biases, slot, log_sum, centre, scale2, row, key_limit, offset, documents, q_len,
            D, HEAD_DIM, COLUMNS, CAUSAL, DOCUMENTS, BIAS, False, TMA, UPCAST, PRECISION,
        )  # fmt: skip
        cell = own + step % VISITS * cells + slot
        store_by_products(mass, grad_bias, cell, p, ds, weight, MASS, GRAD_BIAS, PARTS)
    if CAUSAL or LENGTHS or DOCUMENTS or BIAS or not EVEN_KEYS:
        for step in tl.range(0, (count - (full - low)) * VISITS, num_stages=1):
            slot = step // VISITS
            slot = tl.where(slot < low, slot, slot + full - low)
            start = tl.load(entries + slot) * BLOCK_K + (step % VISITS) * COLUMNS
            acc, p, ds = _query_tile(
                acc, q, g, k_source, v_source, k_stride_b, k_stride_h, k_stride_n,
                v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
                biases, slot, log_sum, centre, scale2, row, key_limit, offset, documents, q_len,
                D, HEAD_DIM, COLUMNS, CAUSAL, DOCUMENTS, BIAS, True, TMA, UPCAST, PRECISION,
            )  # fmt: skip
            cell = own + step % VISITS * cells + slot
            store_by_products(mass, grad_bias, cell, p, ds, weight, MASS, GRAD_BIAS, PARTS)
    store_rows(
        grad_q, dq_stride_b, dq_stride_h, dq_stride_n, batch, head, first, q_len, acc * scale,
        PACK, ROWS, D, HEAD_DIM,
    )  # fmt: skip
    if OVERLAP and query_tile + tl.program_id(1) + batch == 0:
        # This kernel must not end before the one that it overlaps has.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _key_tile(
    dk, dv, k, v, q_source, g_source, q_stride_b, q_stride_h, q_stride_n,
    g_stride_b, g_stride_h, g_stride_n, lse2, delta, batch, head, first, bias,
    q_len, padded_len, num_heads, scale2, column, key_limit, offset, documents,
    PACK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    TMA_Q: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one query tile to dK and dV. Logits stand transposed, ``(m, n)``."""
    q = load_rows(
        q_source, q_stride_b, q_stride_h, q_stride_n, batch, head, first, q_len,
        PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    g = load_rows(
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
        if BIAS:
            key_limit = tl.where(bias == float("-inf"), 0, key_limit)
        ok = visible(
            row[None, :], column[:, None], batch, key_limit, offset, documents, q_len,
            CAUSAL, DOCUMENTS,
        )  # fmt: skip
        p = tl.where(ok, p, 0.0)
        # Rows whose g or q is not finite have p = NaN where they read.
        g = finite_part(g)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    ds = p * (dp - centre[None, :])
    if MASKED:
        ds = tl.where(p == 0, 0.0, ds)
        q = finite_part(q)
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
    DOCUMENTS: tl.constexpr, EVEN_KEYS: tl.constexpr, EVEN_QUERIES: tl.constexpr,
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
    k = load_rows(
        k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    v = load_rows(
        v_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    # Queries [row_low, row_end) see all these keys.
    row_low = 0
    row_end = q_len
    if CAUSAL:
        row_low = start + COLUMNS - 1 - offset
    if DOCUMENTS:
        last = tl.minimum(start + COLUMNS, kv_len) - 1
        document_start, document_end = document_of(documents, bounds, batch, start, last, q_len)
        row_low = tl.maximum(row_low, document_start)
        row_end = document_end
    if LENGTHS or not EVEN_KEYS:
        row_end = tl.where(start + COLUMNS <= key_limit, row_end, 0)
    dk = tl.zeros([COLUMNS, D], tl.float32)
    dv = tl.zeros([COLUMNS, D], tl.float32)
    MASKS: tl.constexpr = CAUSAL or LENGTHS or DOCUMENTS or BIAS or not (EVEN_KEYS and EVEN_QUERIES)
    # Heads that share one list are visited in one loop, the others one after another.
    TOGETHER: tl.constexpr = GROUP // PACK if HEADS_PER_PATTERN % GROUP == 0 else 1
    ROW_VISITS: tl.constexpr = BLOCK_Q // ROWS
    VISITS: tl.constexpr = ROW_VISITS * TOGETHER
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
        if MASKS:
            low = count_below(entries, count, width, BLOCK_Q, row_low)
            full = count_below(entries, count, width, BLOCK_Q, row_end - BLOCK_Q + 1)
            full = tl.maximum(full, low)
            if BIAS:
                dead = count_tiles_left_out(biases, entries, count, width, b_stride_i)
                full = tl.where(dead > 0, low, full)
        upcoming = tl.load(entries + low, mask=low < full, other=0)
        for step in tl.range(low * VISITS, full * VISITS, num_stages=STAGES):
            entry = upcoming
            following = (step + 1) // VISITS
            upcoming = tl.load(entries + following, mask=following < full, other=0)
            block_q = entry // width
            first = block_q * BLOCK_Q + (step % ROW_VISITS) * ROWS
            bias = 0.0
            if BIAS:
                bias = tl.load(biases + block_q.to(tl.int64) * b_stride_i + entry % width) * LOG2E
            dk, dv = _key_tile(
                dk, dv, k, v, q_source, g_source,
                q_stride_b, q_stride_h, q_stride_n, g_stride_b, g_stride_h, g_stride_n,
                lse2, delta,
                batch, head + step % VISITS // ROW_VISITS * PACK, first,
                bias, q_len, padded_len, num_heads, scale2, column, key_limit, offset, documents,
                PACK, ROWS, D, HEAD_DIM, CAUSAL, DOCUMENTS, BIAS, False,
                TMA_Q, UPCAST, PRECISION,
            )  # fmt: skip
        if MASKS:
            for step in tl.range(0, (count - (full - low)) * VISITS, num_stages=1):
                place = step // VISITS
                place = tl.where(place < low, place, place + full - low)
                entry = tl.load(entries + place)
                block_q = entry // width
                first = block_q * BLOCK_Q + (step % ROW_VISITS) * ROWS
                bias = 0.0
                if BIAS:
                    at = block_q.to(tl.int64) * b_stride_i + entry % width
                    bias = tl.load(biases + at) * LOG2E
                dk, dv = _key_tile(
                    dk, dv, k, v, q_source, g_source,
                    q_stride_b, q_stride_h, q_stride_n, g_stride_b, g_stride_h, g_stride_n,
                    lse2, delta,
                    batch, head + step % VISITS // ROW_VISITS * PACK, first,
                    bias, q_len, padded_len, num_heads, scale2, column, key_limit, offset,
                    documents,
                    PACK, ROWS, D, HEAD_DIM, CAUSAL, DOCUMENTS, BIAS, True,
                    TMA_Q, UPCAST, PRECISION,
                )  # fmt: skip
    store_rows(
        grad_k, dk_stride_b, dk_stride_h, dk_stride_n, batch, kv_head, start, kv_len, dk * scale,
        1, COLUMNS, D, HEAD_DIM,
    )  # fmt: skip
    store_rows(
        grad_v, dv_stride_b, dv_stride_h, dv_stride_n, batch, kv_head, start, kv_len, dv,
        1, COLUMNS, D, HEAD_DIM,
    )  # fmt: skip


def launch_backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, starts: Tensor,
    slots: Tensor, want_bias: bool, want_mass: bool, *, config: LaunchConfig | None = None,
    config_query: LaunchConfig | None = None, overlap: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, block bias and mass probe (the last two may be empty).

    Args:
        call: As in the forward pass.
        out: Its output.
        lse: Its lse.
        grad_out: Gradient of the output; last dimension contiguous.
        grad_lse: Gradient of the lse, contiguous, or None.
        starts: ``PatternTranspose.offsets``.
        slots: ``PatternTranspose.slots``.
        want_bias: Whether the bias's gradient is wanted.
        want_mass: Whether the tile mass is wanted.
        config: Launch of the dK, dV kernel.
        config_query: Launch of the dQ kernel.
        overlap: Let the dQ kernel fill multiprocessors that the end of the dK, dV kernel leaves
            idle (programmatic dependent launch, Hopper and later).
    """
    grads = _empty_gradients(call.query, call.key, call.indices, want_bias, want_mass)
    dq, dk, dv, grad_bias, mass = grads
    batch, q_len, num_heads, head_dim = call.query.shape
    kv_len, num_kv_heads = call.key.shape[1:3]
    if call.empty:
        for x in grads:
            x.zero_()
        return grads
    device = call.query.device
    query_blocks, width = call.indices.shape[2:]
    padded_len = query_blocks * call.block_q
    lse2, delta, norm = rows = [
        lse.new_empty(batch, num_heads, padded_len, dtype=torch.float32) for _ in range(3)
    ]
    tile = call.tile()
    config_query = config_query or query_config(tile)
    pack_query = tile.pack(config_query.rows)
    # Before the dK, dV kernel, whose memory must not be given to the one that overlaps it.
    of_bias, of_mass = (
        empty_parts(call, config_query, pack_query) if wanted else None
        for wanted in (want_bias, want_mass)
    )
    overlap = overlap and not INTERPRETED and capability(device) >= (9, 0)
    scales = call.scale, call.scale * LOG2E.value
    with on_device(device):
        row_kernel[(triton.cdiv(padded_len, 32), num_heads, batch)](
            out, *strides(out), grad_out, *strides(grad_out),
            lse, lse if grad_lse is None else grad_lse, *rows, q_len, padded_len, num_heads,
            ROWS=32, D=call.padded_head_dim, HEAD_DIM=head_dim, GRAD_LSE=grad_lse is not None,
            num_warps=4,
        )  # fmt: skip
        config = config or key_config(tile)
        # Three TF32 products of two heads do not fit the registers.
        pack = 1 if tile.full_precision else tile.pack(config.rows)
        (query, gradient), tma_q = sources((call.query, grad_out), pack, config.rows, call)
        (key, value), tma = sources((call.key, call.value), 1, config.columns, call)
        key_kernel[(triton.cdiv(kv_len, config.columns), batch * num_kv_heads)](
            *query, *key, *value, *gradient, dk, *strides(dk), dv, *strides(dv), lse2, delta,
            starts, *starts.stride()[:2], slots, *slots.stride()[:2],
            *call.mask_arguments(), q_len, kv_len, padded_len, call.offset, *scales, num_heads,
            query_blocks, width,
            **call.constants(), PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
            EVEN_QUERIES=q_len % call.block_q == 0,
            TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages, OVERLAP=overlap,
            **config.options(),
        )  # fmt: skip
        config, pack = config_query, pack_query
        tiles = triton.cdiv(q_len, config.rows)
        (query, gradient), tma_q = sources((call.query, grad_out), pack, config.rows, call)
        (key, value), tma = sources((call.key, call.value), 1, config.columns, call)
        query_kernel[(tiles, num_heads // pack, batch)](
            *query, *key, *value, *gradient, dq, *strides(dq), *rows,
            lse2 if of_bias is None else of_bias, lse2 if of_mass is None else of_mass,
            call.counts, *call.counts.stride(), call.indices, *call.indices.stride()[:3],
            *call.mask_arguments(), q_len, kv_len, padded_len, call.offset, *scales, num_heads,
            tiles, query_blocks, width,
            **call.constants(), PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
            GRAD_BIAS=want_bias, MASS=want_mass, PARTS=parts_of(config, pack),
            TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages, OVERLAP=overlap,
            **config.options(), **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    if of_bias is not None:
        collect(call, config, of_bias, norm, grad_bias, share=False)
    if of_mass is not None:
        collect(call, config, of_mass, norm, mass, share=True)
    return grads


def _empty_gradients(
    query: Tensor, key: Tensor, kv_indices: Tensor, want_bias: bool, want_mass: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, mass = (
        query.new_empty(kv_indices.shape if wanted else (0,), dtype=torch.float32)
        for wanted in (want_bias, want_mass)
    )
    dk, dv = key.new_empty(key.shape), key.new_empty(key.shape)
    return query.new_empty(query.shape), dk, dv, bias, mass


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_backward", mutates_args=())
def backward_op(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor,
    value: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, block_bias: Tensor | None,
    starts: Tensor, slots: Tensor, key_lengths: Tensor | None, query_offset: Tensor | None,
    document_ids: Tensor | None, bounds: Tensor | None, block_q: int, block_k: int, causal: bool,
    offset: int, scale: float, want_bias: bool, want_mass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, block bias and mass probe (the last two may be empty)."""
    call = Call(
        query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
        document_ids, bounds, block_q, block_k, causal, offset, scale,
    )  # fmt: skip
    return launch_backward(call, out, lse, grad_out, grad_lse, starts, slots, want_bias, want_mass)


@backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(args[4], args[5], args[8], *args[-2:])
