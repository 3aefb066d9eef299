"""Kernels of budgets that depend on nothing later; see ``selection/budget.py``."""

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
def share_kernel(
    means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
    rows, r_stride_b, diagonal, d_stride_b,
    forced, f_stride_b, f_stride_h, limit, l_stride_b, l_stride_h,
    gain, offset, base_sparsity, even, exact, slope, complexity, units,
    num_rows, columns, steps, heads, kv_heads,
    ROWS: tl.constexpr, PART: tl.constexpr, CHUNKS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, LOWER: tl.constexpr,
    ADAPTIVE: tl.constexpr, DIAGONAL: tl.constexpr,
    MIN_FACTOR: tl.constexpr, MAX_FACTOR: tl.constexpr, PER_HEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Real-valued budgets of ``ROWS`` rows of a plane, and what each earns in ``2**-BITS`` blocks.

    Launched without fused multiply-adds: the share must round as PyTorch's does. In float64 share
    times blocks is exact (24 + 24 bits), so that the earned units equal those of PyTorch.
    """
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
        PART, CHUNKS, D, HEAD_DIM, ADAPTIVE, DIAGONAL, True, MIN_FACTOR, MAX_FACTOR, PER_HEAD,
    )  # fmt: skip
    low = tl.load(rows + batch * r_stride_b + row, mask=ok, other=0)
    end = tl.load(rows + batch * r_stride_b + num_rows + row, mask=ok, other=0)
    allowed = tl.maximum(end - low, 0)
    least = tl.load(forced + batch * f_stride_b + head * f_stride_h + row, mask=ok, other=0)
    most = tl.load(limit + batch * l_stride_b + head * l_stride_h + row, mask=ok, other=0)
    earned = keep.to(tl.float64) * allowed.to(tl.float64)
    if LOWER:
        part = tl.load(even).to(tl.float64)
        earned = part * earned + (1.0 - part) * least.to(tl.float64)
    earned = tl.minimum(earned, most.to(tl.float64))
    tl.store(units + place, nearest(earned * (1 << BITS)), mask=ok)
    count, least, most = allowed.to(tl.float32), least.to(tl.float32), most.to(tl.float32)
    value = keep * count
    raised = tl.maximum(value, least)
    tl.store(exact + place, tl.minimum(raised, most), mask=ok)
    # At a bound half the gradient passes, as PyTorch's maximum and minimum have it.
    above = tl.where(value > least, 1.0, tl.where(value == least, 0.5, 0.0))
    below = tl.where(raised < most, 1.0, tl.where(raised == most, 0.5, 0.0))
    tl.store(slope + place, step * count * above * below, mask=ok)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _larger_before(before_a, a, before_b, b):
    """Maxima of all entries but the last, and of all."""
    return tl.maximum(a, before_b), tl.maximum(a, b)


@triton.jit
def _since(values, fresh, carried, begun):
    """Running sums of numbers that are not negative, anew from each fresh row on.

    ``carried``: sum of the rows before; ``begun``: of those before their last document. The sums
    never fall, so that their largest value at a fresh row is the latest.
    """
    total = carried + tl.cumsum(values, 0)
    starts = tl.associative_scan(tl.where(fresh, total - values, 0), 0, _larger)
    starts = tl.maximum(starts, begun)
    return total - starts, carried + tl.sum(values, 0), tl.maximum(begun, tl.max(starts, 0))


@triton.jit(do_not_specialize=VARYING)
def running_kernel(
    units, forced, f_stride_b, f_stride_h, limit, l_stride_b, l_stride_h, document, o_stride_b,
    budget, num_rows, heads, BITS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Integer budgets of one plane: what was earned and not given, at least what is forced.

    Each head adds its rounding phase, see ``rounding_phases``.
    """
    follow(PDL)
    # Keeps the running maxima of one document above those of the documents before it.
    STEP: tl.constexpr = 1 << 40
    NOTHING: tl.constexpr = -(1 << 62)
    plane = tl.cast(tl.program_id(0), tl.int64)
    batch, head = plane // heads, plane % heads
    phase = ((2 * head + 1) << BITS) // (2 * heads)
    lane = tl.arange(0, CHUNK)
    zero = tl.zeros([1], tl.int64)
    earned_before, earned_start, due_before, due_start = zero, zero, zero, zero
    highest = zero + NOTHING
    for start in range(0, num_rows, CHUNK):
        row = start + lane
        ok = row < num_rows
        names = document + batch * o_stride_b + row
        name = tl.load(names, mask=ok, other=0).to(tl.int64)
        fresh = name != tl.load(names - 1, mask=ok & (row > 0), other=-1).to(tl.int64)
        earned = tl.load(units + plane * num_rows + row, mask=ok, other=0)
        must = tl.load(forced + batch * f_stride_b + head * f_stride_h + row, mask=ok, other=0)
        must = must.to(tl.int64)
        earned, earned_before, earned_start = _since(
            earned, fresh & ok, earned_before, earned_start
        )
        due, due_before, due_start = _since(must, fresh & ok, due_before, due_start)
        surplus = tl.maximum(((earned + phase) >> BITS) - due, 0) + name * STEP
        surplus = tl.where(ok, surplus, NOTHING)
        before, peak = tl.associative_scan(
            (tl.full([CHUNK], NOTHING, tl.int64), surplus), 0, _larger_before
        )
        before, peak = tl.maximum(before, highest), tl.maximum(peak, highest)
        given = due + peak - name * STEP
        given -= tl.where(fresh, 0, due - must + before - name * STEP)
        most = tl.load(limit + batch * l_stride_b + head * l_stride_h + row, mask=ok, other=0)
        found = tl.minimum(given, most.to(tl.int64)).to(tl.int32)
        tl.store(budget + plane * num_rows + row, found, mask=ok)
        highest = tl.maximum(highest, tl.max(surplus, 0))
