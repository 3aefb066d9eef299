"""Kernels that spread the rows' shares over a whole sequence: the water level's budgets."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_selection.triton_kernels.row_shares import row_share
from dilated_attention_pytorch.ops.block_selection.triton_kernels.shared import (
    VARYING,
    follow,
    nearest,
)


@triton.jit(do_not_specialize=VARYING)
def budget_kernel(
    means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
    rows, r_stride_b, diagonal, d_stride_b, document, o_stride_b,
    forced, f_stride_b, f_stride_h, limit, l_stride_b, l_stride_h,
    filled, e_stride_b, e_stride_h, rising, t_stride_b, t_stride_h, share, a_stride_b,
    gain, offset, base_sparsity,
    exact, slope, complexity,
    num_rows, columns, steps, heads, kv_heads, width,
    ROWS: tl.constexpr, PART: tl.constexpr, CHUNKS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    STEPS: tl.constexpr, ADAPTIVE: tl.constexpr, DIAGONAL: tl.constexpr,
    MIN_FACTOR: tl.constexpr, MAX_FACTOR: tl.constexpr, PER_HEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Real-valued budgets of ``ROWS`` rows of a plane; see ``water_level_budget``."""
    follow(PDL)
    plane = tl.program_id(1)
    batch = tl.cast(plane // heads, tl.int64)
    head = plane % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < num_rows
    place = tl.cast(plane, tl.int64) * num_rows + row
    keep, step = row_share(
        means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
        rows, r_stride_b, diagonal, d_stride_b, gain, offset, base_sparsity, complexity,
        plane, row, num_rows, columns, steps, heads, kv_heads,
        PART, CHUNKS, D, HEAD_DIM, ADAPTIVE, DIAGONAL, False, MIN_FACTOR, MAX_FACTOR, PER_HEAD,
    )  # fmt: skip
    of = tl.load(document + batch * o_stride_b + row, mask=ok, other=0).to(tl.int64)
    levels = filled + batch * e_stride_b + head * e_stride_h + of * (width + 2)
    goal = keep * tl.load(share + batch * a_stride_b + of, mask=ok, other=0.0)
    # Binary search for the number of entries that do not exceed the goal.
    below = tl.zeros([ROWS], tl.int32)
    above = below + (width + 2)
    for _ in tl.static_range(STEPS):
        middle = (below + above) // 2
        inside = middle < width + 2
        reached = inside & (tl.load(levels + middle, mask=ok & inside, other=0.0) <= goal)
        open_ = below < above
        below = tl.where(open_ & reached, middle + 1, below)
        above = tl.where(open_ & (reached == 0), middle, above)
    level = tl.minimum(tl.maximum(below - 1, 0), width)
    floor = tl.load(levels + level, mask=ok, other=0.0)
    climbing = rising + batch * t_stride_b + head * t_stride_h + of * (width + 1)
    rate = tl.load(climbing + level, mask=ok, other=0.0)
    part = tl.where(rate > 0, (goal - floor) / tl.maximum(rate, 1.0), 0.0)
    value = level.to(tl.float32) + part
    least = tl.load(forced + batch * f_stride_b + head * f_stride_h + row, mask=ok, other=0)
    most = tl.load(limit + batch * l_stride_b + head * l_stride_h + row, mask=ok, other=0)
    least, most = least.to(tl.float32), most.to(tl.float32)
    open_ = (value > least) & (value < most) & (rate > 0)
    total = tl.load(share + batch * a_stride_b + of, mask=ok, other=0.0)
    tl.store(slope + place, tl.where(open_, step * total / tl.maximum(rate, 1.0), 0.0), mask=ok)
    tl.store(exact + place, tl.minimum(tl.maximum(value, least), most), mask=ok)


@triton.jit(do_not_specialize=VARYING)
def round_kernel(
    exact, rounded, num_rows, heads, BITS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr
):
    """Integers whose running sums stay within a block; one plane, one document.

    Each head adds its rounding phase, see ``rounding_phases``.
    """
    follow(PDL)
    plane = tl.cast(tl.program_id(0), tl.int64)
    lane = tl.arange(0, CHUNK)
    carried = tl.zeros([1], tl.int64)
    UNIT: tl.constexpr = 1 << BITS
    phase = ((2 * (plane % heads) + 1) << BITS) // (2 * heads)
    for start in range(0, num_rows, CHUNK):
        row = start + lane
        ok = row < num_rows
        units = nearest(tl.load(exact + plane * num_rows + row, mask=ok, other=0.0) * UNIT)
        running = carried + tl.cumsum(units, 0)
        upper = (running + phase) >> BITS
        lower = (running - units + phase) >> BITS
        tl.store(rounded + plane * num_rows + row, (upper - lower).to(tl.int32), mask=ok)
        carried += tl.sum(units, 0)
