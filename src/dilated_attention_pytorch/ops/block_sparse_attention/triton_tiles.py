"""What the Triton kernels of block-sparse attention share: reading, writing and masking tiles.

Names inside all kernels: a *tile* is one kept (query block, key block) pair of the pattern. A
program works on ``ROWS`` query tokens of ``PACK`` query heads that share keys and pattern, or on
``COLUMNS`` key tokens; both divide the pattern's blocks. Logits live in base 2: the scale carries
log2(e), so that every exponential is one ``exp2``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
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
def store_rows(
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
def visible(
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
    ok = (column < key_limit) & (row < q_len)
    if CAUSAL:
        ok = ok & (column <= row + offset)
    if DOCUMENTS:
        ids = documents + tl.cast(batch, tl.int64) * q_len
        of_row = tl.load(ids + row, mask=row < q_len, other=-1)
        of_column = tl.load(ids + column, mask=column < q_len, other=-2)
        ok = ok & (of_row == of_column) & (of_row >= 0)
    return ok


@triton.jit
def finite_part(tile):
    """0 for NaN and infinities, which in a product would reach rows that must not read them.

    0 * NaN is NaN. Rows that do read them must have NaN as their weight.
    """
    return tl.where(tl.abs(tile) < float("inf"), tile, 0.0).to(tile.dtype)


@triton.jit
def any_left_out(biases, count):
    """How many of the first ``count`` biases are -inf: nobody reads their tiles."""
    lane = tl.arange(0, 128)
    total = 0
    for chunk in range(0, count, 128):
        place = chunk + lane
        bias = tl.load(biases + place, mask=place < count, other=0.0)
        total += tl.sum((bias == float("-inf")).to(tl.int32))
    return total


@triton.jit
def any_tile_left_out(biases, entries, count, width, stride_i):
    """The same for tiles listed as ``query_block * width + slot``."""
    lane = tl.arange(0, 128)
    total = 0
    for chunk in range(0, count, 128):
        place = chunk + lane
        entry = tl.load(entries + place, mask=place < count, other=0)
        at = (entry // width).to(tl.int64) * stride_i + entry % width
        bias = tl.load(biases + at, mask=place < count, other=0.0)
        total += tl.sum((bias == float("-inf")).to(tl.int32))
    return total


@triton.jit
def document_of(documents, bounds, batch, first, last, q_len):
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
def count_below(entries, count, divisor, factor, threshold):
    """How many of the first ``count`` ascending entries have ``entry // divisor * factor`` below."""  # noqa: E501
    lane = tl.arange(0, 128)
    total = 0
    for chunk in range(0, count, 128):
        place = chunk + lane
        entry = tl.load(entries + place, mask=place < count, other=0)
        below = (entry // divisor * factor < threshold) & (place < count)
        total += tl.sum(below.to(tl.int32))
    return total


INTERPRETED = not isinstance(load_rows, triton.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` was set when this file was imported: kernels run on the CPU."""
