"""The share of its visible blocks that a row may read, by what they hold."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_selection.triton_kernels.shared import (
    PRECISE,
    VARYING,
    follow,
)


@triton.jit
def _unit(source, offset, ok, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows at ``offset`` at length 1; zeros where not ``ok`` or not finite."""
    column = tl.arange(0, D)
    keep = ok[:, None] & (column < HEAD_DIM)[None, :]
    row = tl.load(source + offset[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(row * row, 1))
    row = row / tl.maximum(norm, 1e-12)[:, None]
    return tl.where((row == row) & (tl.abs(row) != float("inf")), row, 0.0)


@triton.jit(do_not_specialize=VARYING)
def prefix_kernel(
    means, m_stride_b, m_stride_h, m_stride_j,
    prefix, totals, columns, steps, heads,
    PART: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Running sums of the unit means inside chunks of columns, and each chunk's total."""
    follow(PDL)
    chunk = tl.program_id(0)
    plane = tl.cast(tl.program_id(1), tl.int64)
    source = means + plane // heads * m_stride_b + plane % heads * m_stride_h
    column = tl.arange(0, D)
    real = column < HEAD_DIM
    carried = tl.zeros([D], tl.float32)
    for step in range(steps):
        place = (chunk * steps + step) * PART + tl.arange(0, PART)
        ok = place < columns
        unit = _unit(source, place.to(tl.int64) * m_stride_j, ok, D, HEAD_DIM)
        target = prefix + (plane * columns + place)[:, None] * HEAD_DIM + column[None, :]
        running = carried[None, :] + tl.cumsum(unit, 0)
        tl.store(target, running, mask=ok[:, None] & real[None, :])
        carried += tl.sum(unit, 0)
    tl.store(totals + (plane * CHUNKS + chunk) * HEAD_DIM + column, carried, mask=real)


@triton.jit
def _inside(prefix, first, index, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Sum of the unit means from the start of a column's chunk to before column ``index``."""
    column = tl.arange(0, D)
    return tl.load(
        prefix + (first + index - 1)[:, None] * HEAD_DIM + column[None, :],
        mask=(index > 0)[:, None] & (column < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _between(
    prefix, totals, plane, low, end, columns, steps,
    PART: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sums of the unit means of columns ``[low, end)``."""
    low, end = tl.minimum(low, columns), tl.minimum(end, columns)
    first = plane * columns
    total = _inside(prefix, first, end, D, HEAD_DIM) - _inside(prefix, first, low, D, HEAD_DIM)
    low_chunk = tl.maximum(low - 1, 0) // (steps * PART)
    end_chunk = tl.maximum(end - 1, 0) // (steps * PART)
    chunk = tl.arange(0, CHUNKS)
    column = tl.arange(0, D)
    there = (chunk * steps * PART < columns)[:, None] & (column < HEAD_DIM)[None, :]
    of_chunks = tl.load(
        totals + (plane * CHUNKS + chunk)[:, None] * HEAD_DIM + column[None, :],
        mask=there, other=0.0,
    )  # fmt: skip
    passed = (low_chunk[:, None] <= chunk[None, :]) & (chunk[None, :] < end_chunk[:, None])
    return tl.dot(passed.to(tl.float32), of_chunks, total, input_precision=PRECISE)


@triton.jit
def _likeness(
    means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
    batch, head, kv_heads, low, end, near, columns, steps,
    PART: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Complexity of some rows under the keys of one head; see ``content_complexity``."""
    stop = tl.maximum(end, low)
    total = _between(
        prefix, totals, batch * kv_heads + head, low, stop, columns, steps,
        PART, CHUNKS, D, HEAD_DIM,
    )  # fmt: skip
    count = stop - low
    if DIAGONAL:
        inside = (near >= low) & (near < stop)
        source = means + batch * m_stride_b + tl.cast(head, tl.int64) * m_stride_h
        mine = _unit(source, near.to(tl.int64) * m_stride_j, inside, D, HEAD_DIM)
        others = count - inside.to(tl.int32)
        likeness = tl.sum(mine * (total - mine), 1) / tl.maximum(others, 1)
        known = others > 0
    else:
        pairs = count.to(tl.float32) * (count - 1).to(tl.float32)
        likeness = (tl.sum(total * total, 1) - count) / tl.maximum(pairs, 1.0)
        known = count > 1
    clipped = tl.minimum(tl.maximum(1.0 - likeness, 0.0), 1.0)
    return tl.where(known, clipped, 1.0)


@triton.jit
def row_share(
    means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
    rows, r_stride_b, diagonal, d_stride_b, gain, offset, base_sparsity, complexity,
    plane, row, num_rows, columns, steps, heads, kv_heads,
    PART: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    ADAPTIVE: tl.constexpr, DIAGONAL: tl.constexpr, PAST: tl.constexpr,
    MIN_FACTOR: tl.constexpr, MAX_FACTOR: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Shares of some rows, and how each moves with the factor; see ``share_by_content``.

    ``PAST``: nothing of the diagonal block counts, as ``content_complexity(past_only=True)``.
    """
    batch = tl.cast(plane // heads, tl.int64)
    head = plane % heads
    ok = row < num_rows
    base = 1.0 - tl.load(base_sparsity)
    keep = base + tl.zeros(row.shape, tl.float32)
    step = keep
    if ADAPTIVE:
        low = tl.load(rows + batch * r_stride_b + row, mask=ok, other=0)
        end = tl.load(rows + batch * r_stride_b + num_rows + row, mask=ok, other=0)
        near = tl.load(diagonal + batch * d_stride_b + row, mask=ok, other=0).to(tl.int32)
        if PAST:
            end = tl.minimum(end, near)
            near -= 1
        # One pattern for all heads takes their mean; otherwise heads of a group share one.
        first = head * kv_heads // heads
        found = tl.zeros(row.shape, tl.float32)
        for extra in range(PER_HEAD):
            found += _likeness(
                means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
                batch, first + extra, kv_heads, low, end, near, columns, steps,
                PART, CHUNKS, D, HEAD_DIM, DIAGONAL,
            )  # fmt: skip
        found = found / PER_HEAD
        tl.store(complexity + tl.cast(plane, tl.int64) * num_rows + row, found, mask=ok)
        factor = tl.load(offset + head).to(tl.float32)
        factor = factor + tl.load(gain + head).to(tl.float32) * found
        free = (factor >= MIN_FACTOR) & (factor <= MAX_FACTOR)
        factor = tl.minimum(tl.maximum(factor, MIN_FACTOR), MAX_FACTOR)
        keep = tl.div_rn(1.0, 1.0 + tl.div_rn(1.0 - keep, keep * factor))
        step = tl.where(free, keep * (1.0 - keep) / factor, 0.0)
    return keep, step
