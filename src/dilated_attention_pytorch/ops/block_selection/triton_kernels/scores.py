"""Kernels that score pairs of blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_selection.triton_kernels.shared import (
    PRECISE,
    VARYING,
    follow,
)


@triton.jit(do_not_specialize=VARYING)
def tower_kernel(
    queries, q_stride_b, q_stride_h, q_stride_i, keys, k_stride_b, k_stride_h, k_stride_i,
    query_weight, key_weight, gain, query_out, key_out,
    num_query_rows, num_key_rows, heads, query_group, key_group, share, factor,
    ROWS: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
    R: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First maps of one head's summaries; heads that share a pattern lie side by side.

    The first programs take the queries, with the gain; the others the keys.
    """
    follow(PDL)
    query_tiles = tl.cdiv(num_query_rows, ROWS)
    tile = tl.program_id(0)
    of_keys = tile >= query_tiles
    row = tl.where(of_keys, tile - query_tiles, tile) * ROWS + tl.arange(0, ROWS)
    num_rows = tl.where(of_keys, num_key_rows, num_query_rows)
    summaries = tl.where(of_keys, keys, queries)
    s_stride_b = tl.where(of_keys, k_stride_b, q_stride_b)
    s_stride_h = tl.where(of_keys, k_stride_h, q_stride_h)
    s_stride_i = tl.where(of_keys, k_stride_i, q_stride_i)
    weight = tl.where(of_keys, key_weight, query_weight)
    group = tl.where(of_keys, key_group, query_group)
    head = tl.program_id(1) % heads
    batch = tl.cast(tl.program_id(1) // heads, tl.int64)
    rank = tl.arange(0, R)
    source = summaries + batch * s_stride_b + tl.cast(head // group, tl.int64) * s_stride_h
    acc = tl.zeros([ROWS, R], tl.float32)
    for start in tl.static_range(0, S, PART):
        place = start + tl.arange(0, PART)
        x = tl.load(
            source + row.to(tl.int64)[:, None] * s_stride_i + place[None, :],
            mask=(row < num_rows)[:, None] & (place < SIZE)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        w = tl.load(
            weight + (head * SIZE + place)[:, None] * RANK + rank[None, :],
            mask=(place < SIZE)[:, None] & (rank < RANK)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        acc = tl.dot(x, w, acc, input_precision=PRECISE)
    acc = acc * tl.where(of_keys, 1.0, tl.load(gain).to(tl.float32) * factor)
    plane = batch * (heads // share) + head // share
    out = tl.where(of_keys, key_out, query_out)
    target = out + (plane * num_rows + row.to(tl.int64)) * (share * RANK) + head % share * RANK
    tl.store(
        target[:, None] + rank[None, :],
        acc,
        mask=(row < num_rows)[:, None] & (rank < RANK)[None, :],
    )


@triton.jit(do_not_specialize=VARYING)
def product_kernel(
    query, key, scores, num_rows, num_keys,
    R: tl.constexpr, RANK: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of some rows of ``query`` with some rows of ``key``."""
    follow(PDL)
    if EVEN:
        # So that the compiler knows, and writes several scores at once.
        num_keys = num_keys // 16 * 16
    tiles = tl.cdiv(num_keys, C)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * C + tl.arange(0, C)
    plane = tl.cast(tl.program_id(1), tl.int64)
    of_row, of_column = (row < num_rows)[:, None], (column < num_keys)[:, None]
    total = tl.zeros([ROWS, C], tl.float32)
    for start in tl.static_range(0, R, PART):
        r = start + tl.arange(0, PART)[None, :]
        q = tl.load(
            query + (plane * num_rows + row)[:, None] * RANK + r,
            mask=of_row & (r < RANK), other=0.0,
        )  # fmt: skip
        k = tl.load(
            key + (plane * num_keys + column)[:, None] * RANK + r,
            mask=of_column & (r < RANK), other=0.0,
        )  # fmt: skip
        total = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), total, input_precision=PRECISE)
    target = scores + (plane * num_rows + row)[:, None] * num_keys + column[None, :]
    tl.store(target, total, mask=of_row & (column < num_keys)[None, :])


@triton.jit(do_not_specialize=VARYING)
def bilinear_kernel(
    query, key, candidates, c_stride_b, c_stride_h, c_stride_i, scores,
    num_rows, columns, num_keys, tiles, heads,
    R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Products of one row of ``query`` with the rows of ``key`` that its candidates name."""
    row = tl.program_id(0) // tiles % num_rows
    tile = tl.program_id(0) % tiles
    plane = tl.cast(tl.program_id(0) // tiles // num_rows, tl.int64)
    lane = tile * C + tl.arange(0, C)
    ok = lane < columns
    entries = candidates + plane // heads * c_stride_b + plane % heads * c_stride_h
    j = tl.load(entries + tl.cast(row, tl.int64) * c_stride_i + lane, mask=ok, other=-1)
    j = j.to(tl.int64)
    named = (j >= 0) & (j < num_keys)
    total = tl.zeros([C], tl.float32)
    for start in tl.static_range(0, R, PART):
        r = start + tl.arange(0, PART)
        q = tl.load(query + (plane * num_rows + row) * RANK + r, mask=r < RANK, other=0.0)
        k = tl.load(
            key + (plane * num_keys + j)[:, None] * RANK + r[None, :],
            mask=named[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(q.to(tl.float32)[None, :] * k.to(tl.float32), 1)
    tl.store(scores + (plane * num_rows + row) * columns + lane, total, mask=ok)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=VARYING)
def mlp_kernel(
    query, key, candidates, c_stride_b, c_stride_h, c_stride_i,
    bias, hidden, out_weight, gain, scores,
    num_rows, columns, num_keys, tiles, pattern_heads, num_heads,
    R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr, LAYERS: tl.constexpr,
    SHARE: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """The MLP on some pairs of one row, averaged over the heads that share a pattern."""
    row = tl.program_id(0) // tiles % num_rows
    tile = tl.program_id(0) % tiles
    plane = tl.cast(tl.program_id(0) // tiles // num_rows, tl.int64)
    batch = plane // pattern_heads
    shared = plane % pattern_heads
    lane = tile * C + tl.arange(0, C)
    ok = lane < columns
    j = lane.to(tl.int64)
    if LISTS:
        entries = candidates + batch * c_stride_b + shared * c_stride_h
        j = tl.load(entries + tl.cast(row, tl.int64) * c_stride_i + lane, mask=ok, other=-1)
        j = j.to(tl.int64)
    named = ok & (j >= 0) & (j < num_keys)
    r = tl.arange(0, R)
    real = r < RANK
    total = tl.zeros([C], tl.float32)
    for extra in range(SHARE):
        head = shared * SHARE + extra
        own = batch * num_heads + head
        q = tl.load(query + (own * num_rows + row) * RANK + r, mask=real, other=0.0)
        k = tl.load(
            key + (own * num_keys + j)[:, None] * RANK + r[None, :],
            mask=named[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(bias + head * RANK + r, mask=real, other=0.0)
        x = _gelu(k.to(tl.float32) + (q.to(tl.float32) + b.to(tl.float32))[None, :])
        for depth in tl.static_range(1, LAYERS):
            square = (r * RANK)[:, None] + r[None, :]
            w = tl.load(
                hidden + ((depth - 1) * num_heads + head) * RANK * RANK + square,
                mask=real[:, None] & real[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(bias + (depth * num_heads + head) * RANK + r, mask=real, other=0.0)
            x = tl.dot(x, w.to(tl.float32), input_precision="ieee") + b.to(tl.float32)[None, :]
            x = _gelu(x)
        o = tl.load(out_weight + head * RANK + r, mask=real, other=0.0).to(tl.float32)
        total += tl.sum(x * o[None, :], 1)
    total = total * (tl.load(gain).to(tl.float32) / SHARE)
    tl.store(scores + (plane * num_rows + row) * columns + lane, total, mask=ok)
