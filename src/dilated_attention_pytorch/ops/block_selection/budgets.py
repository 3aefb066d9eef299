"""Budgets: how many blocks each row may keep, by what its visible blocks hold.

The share of its visible blocks that a row may keep (``share_by_content``) is the base density p,
its odds multiplied by a factor f of the row's complexity c (``content_complexity``):

    share = p f / (p f + 1 - p),   f = clamp(offset + gain · c),   c = 1 - mean likeness,

the likeness of a block to the others being the product of their means at length 1. From shares to
blocks there are two ways:

* ``row_budget`` (``water_level_budget``): one level x for the rows of a document, a row keeping
  ``clamp(x, forced, limit)``, such that together they keep ``share · visible``; ``round_budget``
  makes integers whose running sums stay within a block.
* ``running_budget``: a row keeps what the rows up to it have earned (``share · visible``, and of
  rows that see little ``share · reach``) and not yet been given, at least its forced blocks:
  nothing depends on what comes later.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.ops.operators import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.triton_device import (
    PRECISE,
    VARYING,
    batch_stride,
    follow,
    nearest,
    on_device,
    overlap,
    plane_strides,
)
from dilated_attention_pytorch.selection.budget import LEAST_FACTOR, MOST_FACTOR

# Chunks of columns that the unit means are added up in, and columns that are read at a time.
_CHUNKS, _PART = 16, 32
# Rows that a program of the running budgets adds up at a time.
MAX_CHUNK = 1024


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
def _row_share(
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


def _launch_prefix(
    means: Tensor | None, gain: Tensor | None, offset: Tensor | None, base_sparsity: Tensor,
    rule: Tensor, diagonal: Tensor, has_diagonal: bool, exact: Tensor,
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[int, ...], dict[str, Any]]:  # fmt: skip
    """Adds up the unit means, on the current device, for budgets ``exact`` (b, p, i).

    Returns:
        The arguments of ``_row_share`` in the order in which the kernels take them: from the means
        to the diagonal; gain, offset and base sparsity; the counts; the compile-time ones.
    """
    batch, heads, _ = exact.shape
    # A compiler may lay its own tensors out in another way than eager.
    rule, diagonal = rule.contiguous(), diagonal.contiguous()
    columns, kv_heads, head_dim, steps = 1, 1, 1, 1
    source: tuple[Any, ...] = (exact, 0, 0, 0)
    prefix = totals = exact
    sizes: dict[str, Any] = {"PART": _PART, "CHUNKS": _CHUNKS, "num_warps": 4}
    if means is not None:
        means = rows_of(means)
        source = (means, *means.stride()[:3])
        _, kv_heads, columns, head_dim = means.shape
        prefix = means.new_empty(batch, kv_heads, columns, head_dim, dtype=torch.float32)
        totals = prefix.new_empty(batch, kv_heads, _CHUNKS, head_dim)
        steps = triton.cdiv(columns, _CHUNKS * _PART)
    sizes |= {"D": triton.next_power_of_2(head_dim), "HEAD_DIM": head_dim}
    if means is not None:
        prefix_kernel[(triton.cdiv(columns, steps * _PART), batch * kv_heads)](
            *source, prefix, totals, columns, steps, kv_heads, **sizes, **overlap(exact.device)
        )
    content = (
        *source, prefix, totals, rule, batch_stride(rule), diagonal, batch_stride(diagonal),
    )  # fmt: skip
    learned = (exact if gain is None else gain, exact if offset is None else offset, base_sparsity)
    constants = sizes | {
        "ADAPTIVE": means is not None, "DIAGONAL": has_diagonal,
        "MIN_FACTOR": LEAST_FACTOR, "MAX_FACTOR": MOST_FACTOR,
        "PER_HEAD": kv_heads if heads == 1 else 1,
    }  # fmt: skip
    return content, learned, (columns, steps, heads, kv_heads), constants


def _empty(rule: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for exact budgets ``(b, p, i)``, their slope in the factor, and the complexity."""
    shape = (batch, heads, rule.shape[2])
    exact, slope, complexity = (rule.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return exact, slope, complexity


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.num_inputs = len(inputs)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[1:3]]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of an operator's second and third input, gain and offset."""
    slope, complexity = ctx.saved_tensors
    if grad is None or ctx.dtypes[0] is None:
        return (None,) * ctx.num_inputs
    pull = grad * slope
    of_gain = (pull * complexity).sum((0, 2)).to(ctx.dtypes[0])
    of_offset = pull.sum((0, 2)).to(ctx.dtypes[1])
    return None, of_gain, of_offset, *(None,) * (ctx.num_inputs - 3)


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
    keep, step = _row_share(
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


@torch.library.custom_op(f"{NAMESPACE}::row_budget", mutates_args=())
def budget_op(
    means: Tensor | None, gain: Tensor | None, offset: Tensor | None, base_sparsity: Tensor,
    rule: Tensor, diagonal: Tensor, document: Tensor, forced: Tensor, limit: Tensor, filled: Tensor,
    rising: Tensor, visible: Tensor, batch: int, heads: int, has_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Real-valued budgets ``(b, p, i)``, their slope in the content's factor, the complexity.

    Args:
        means: ``(b, g, j, d)`` block means, or None for a budget that ignores content.
        gain: ``(p,)`` or None.
        offset: ``(p,)`` or None.
        base_sparsity: 0-dim float32.
        rule: ``(1 or b, 5, i)`` int32.
        diagonal: ``(1 or b, i)`` int64.
        document: ``(1 or b, i)`` int64.
        forced: ``(1 or b, 1 or p, i)``.
        limit: The same.
        filled: ``(1 or b, 1 or p, documents, width + 2)`` float32: blocks kept at each level.
        rising: ``(1 or b, 1 or p, documents, width + 1)`` float32: rows that a level moves.
        visible: ``(1 or b, documents)`` float32.
        batch: Samples.
        heads: Heads of the pattern.
        has_diagonal: Whether rows have a block of their own among the columns.
    """
    exact, slope, complexity = _empty(rule, batch, heads)
    rows, width = exact.shape[2], rising.shape[-1] - 1
    if exact.numel() == 0:
        return exact, slope, complexity
    document, forced, limit, filled, rising, visible = (
        x.contiguous() for x in (document, forced, limit, filled, rising, visible)
    )
    with on_device(exact.device):
        content, learned, counts, constants = _launch_prefix(
            means, gain, offset, base_sparsity, rule, diagonal, has_diagonal, exact
        )
        budget_kernel[(triton.cdiv(rows, 16), batch * heads)](
            *content, document, batch_stride(document), forced, *plane_strides(forced),
            limit, *plane_strides(limit), filled, *plane_strides(filled),
            rising, *plane_strides(rising), visible, batch_stride(visible),
            *learned, exact, slope, complexity, rows, *counts, width,
            ROWS=16, STEPS=(width + 2).bit_length(), **constants, **overlap(exact.device),
        )  # fmt: skip
    return exact, slope, complexity


@budget_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(args[4], args[12], args[13])


budget_op.register_autograd(_backward, setup_context=_setup_context)


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


@torch.library.custom_op(f"{NAMESPACE}::round_budget", mutates_args=())
def round_op(exact: Tensor, bits: int) -> Tensor:
    """int32 budgets whose running sums follow the exact ones ``(b, p, i)``; one document.

    Counted in units of ``2**-bits`` blocks.
    """
    rounded = exact.new_empty(exact.shape, dtype=torch.int32)
    batch, heads, rows = exact.shape
    if exact.numel():
        with on_device(exact.device):
            round_kernel[(batch * heads,)](
                exact.contiguous(), rounded, rows, heads, BITS=bits,
                CHUNK=min(triton.next_power_of_2(rows), 2048), num_warps=4,
                **overlap(exact.device),
            )  # fmt: skip
    return rounded


@round_op.register_fake
def _(exact: Tensor, bits: int) -> Tensor:
    return exact.new_empty(exact.shape, dtype=torch.int32)


@triton.jit(do_not_specialize=VARYING)
def share_kernel(
    means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
    rows, r_stride_b, diagonal, d_stride_b,
    forced, f_stride_b, f_stride_h, limit, l_stride_b, l_stride_h,
    gain, offset, base_sparsity, even, reach, c_stride_b, c_stride_i,
    exact, slope, complexity, units,
    num_rows, columns, steps, heads, kv_heads,
    ROWS: tl.constexpr, PART: tl.constexpr, CHUNKS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, LOWER: tl.constexpr,
    REACH: tl.constexpr, ADAPTIVE: tl.constexpr, DIAGONAL: tl.constexpr,
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
    keep, step = _row_share(
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
    count = allowed.to(tl.float32)
    if REACH:
        far = reach + batch * c_stride_b + row * c_stride_i
        count = tl.maximum(count, tl.load(far, mask=ok, other=0.0))
    earned = keep.to(tl.float64) * count.to(tl.float64)
    if LOWER:
        part = tl.load(even).to(tl.float64)
        earned = part * earned + (1.0 - part) * least.to(tl.float64)
    earned = tl.minimum(earned, most.to(tl.float64))
    tl.store(units + place, nearest(earned * (1 << BITS)), mask=ok)
    least, most = least.to(tl.float32), most.to(tl.float32)
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


@torch.library.custom_op(f"{NAMESPACE}::running_budget", mutates_args=())
def running_budget_op(
    means: Tensor | None, gain: Tensor | None, offset: Tensor | None, base_sparsity: Tensor,
    rule: Tensor, diagonal: Tensor, document: Tensor, forced: Tensor, limit: Tensor,
    even: Tensor | None, reach: Tensor | None, batch: int, heads: int, has_diagonal: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact budgets ``(b, p, i)``, their slope in the factor, the complexity, whole budgets.

    Arguments as of :func:`budget_op`; ``document`` is ascending. ``even`` (0-dim float32 or None):
    so much of what lies above the forced blocks. ``reach`` (float32, 0-dim or ``(1 or b, 1, i)``):
    rows that see fewer blocks count as seeing so many. Shares are counted in ``2**-bits`` blocks.
    """
    exact, slope, complexity = _empty(rule, batch, heads)
    rows, device = exact.shape[2], exact.device
    whole = torch.empty(exact.shape, dtype=torch.int32, device=device)
    if exact.numel() == 0:
        return exact, slope, complexity, whole
    units = torch.empty(exact.shape, dtype=torch.int64, device=device)
    document, forced, limit = document.contiguous(), forced.contiguous(), limit.contiguous()
    bounds = (forced, *plane_strides(forced), limit, *plane_strides(limit))
    far: tuple[Any, ...] = (exact, 0, 0)
    if reach is not None:
        reach = reach.contiguous()
        far = (reach, batch_stride(reach), 1) if reach.dim() else (reach, 0, 0)
    with on_device(device):
        content, learned, counts, constants = _launch_prefix(
            means, gain, offset, base_sparsity, rule, diagonal, has_diagonal, exact
        )
        share_kernel[(triton.cdiv(rows, 16), batch * heads)](
            *content, *bounds, *learned, exact if even is None else even, *far,
            exact, slope, complexity, units, rows, *counts,
            ROWS=16, BITS=bits, LOWER=even is not None, REACH=reach is not None, **constants,
            enable_fp_fusion=False, **overlap(device),
        )  # fmt: skip
        running_kernel[(batch * heads,)](
            units, *bounds, document, batch_stride(document), whole, rows, heads,
            BITS=bits, CHUNK=min(max(triton.next_power_of_2(rows), 32), MAX_CHUNK),
            num_warps=4, **overlap(device),
        )  # fmt: skip
    return exact, slope, complexity, whole


@running_budget_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule, batch, heads = args[4], args[11], args[12]
    exact, slope, complexity = _empty(rule, batch, heads)
    return exact, slope, complexity, exact.new_empty(exact.shape, dtype=torch.int32)


running_budget_op.register_autograd(_backward, setup_context=_setup_context)
