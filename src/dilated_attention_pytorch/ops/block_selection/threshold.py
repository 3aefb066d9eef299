"""Blocks whose expected mass reaches a threshold: kept (``threshold``) or counted (``above``).

The expected mass of a block is its share of the softmaxed scores of its row:

* ``threshold``: ``softmax_j(s_ij) >= τ`` over all that a row sees, its forced blocks included,
  which are kept anyway, as is what a mask names;
* ``above``: over the n blocks that may be chosen by score alone, and at least
  ``τ / (n / 16)**(1/4)``. Where a pattern's heads compete, m heads that expect strictly more of a
  block leave ``e**-m`` of a head's mass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.choice import load_rule, running_count
from dilated_attention_pytorch.ops.operators import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.triton_device import (
    VARYING,
    batch_stride,
    follow,
    on_device,
    overlap,
    plane_strides,
)

_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Differences of numbers within it are finite.
_LIMIT = tl.constexpr(1.0e38)
# A threshold that nothing reaches: ``NO_THRESHOLD``.
_OFF = tl.constexpr(64.0)
# Scores that a program holds at once: 32 a thread.
_TILE = 4096


@triton.jit(do_not_specialize=VARYING)
def threshold_kernel(
    scores, s_stride_b, s_stride_h, s_stride_i, rows, r_stride_b, counts, indices, threshold,
    own_thresholds, t_stride_b, t_stride_h, t_stride_i, kept, num_rows, columns, heads, width,
    C: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, OWN: tl.constexpr, KEPT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Softmax over what a row sees; the packed ascending list of forced and likely blocks.

    What reaches a threshold needs no ranking: of equal scores all do or none does. ``OWN``:
    heads or rows have thresholds of their own. ``KEPT``: a mask of what is kept in any case.
    """
    follow(PDL)
    row = tl.program_id(0) % num_rows
    plane = tl.cast(tl.program_id(0) // num_rows, tl.int64)
    batch = plane // heads
    if EVEN:
        # So that the compiler knows, and reads four scores at once.
        columns = columns // 16 * 16
    low, end, sink_end, near_first, near_end = load_rule(rows, r_stride_b, batch, row, num_rows)
    end = tl.minimum(end, columns)
    column = tl.arange(0, C)
    source = scores + batch * s_stride_b + plane % heads * s_stride_h
    source += tl.cast(row, tl.int64) * s_stride_i
    visible = (column >= low) & (column < end)
    score = tl.load(source + column, mask=visible, other=0.0).to(tl.float32)
    score = tl.maximum(tl.where(score == score, score, _LOWEST), _LOWEST)
    peak = tl.max(tl.where(visible, score, _LOWEST), 0)
    likely = tl.exp(tl.where(visible, score, float("-inf")) - peak)
    total = tl.sum(likely, 0)
    likely = tl.div_rn(likely, tl.where(total > 0.0, total, 1.0))
    forced = (column < sink_end) | ((column >= near_first) & (column < near_end))
    if KEPT:
        whole = (plane * num_rows + row) * columns
        forced |= tl.load(kept + whole + column, mask=visible, other=0) != 0
    if OWN:
        place = batch * t_stride_b + plane % heads * t_stride_h + row * t_stride_i
        threshold = tl.load(own_thresholds + place)
    every = (visible & (forced | (likely >= threshold))).to(tl.int32)
    slot = running_count(every, C) - 1
    count = tl.minimum(tl.sum(every, 0), width)
    place = plane * num_rows + row
    tl.store(counts + place, count)
    tl.store(indices + place * width + slot, column, mask=(every > 0) & (slot < width))
    rest = tl.arange(0, W)
    unused = (rest >= count) & (rest < width)
    tl.store(indices + place * width + rest, rest * 0, mask=unused)


@torch.library.custom_op(f"{NAMESPACE}::threshold_lists", mutates_args=())
def threshold_op(
    scores: Tensor, rule: Tensor, threshold: float, own_thresholds: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Counts ``(b, p, i)`` and ascending lists ``(b, p, i, j)``, int32. No gradient.

    ``scores`` are those of all key blocks ``(b, p, i, j)``; ``rule`` is ``(1 or b, 5, i)`` int32;
    ``own_thresholds`` ``(1 or b, 1 or p, 1 or i)`` are those of samples, heads or rows in the place
    of ``threshold``, or None; ``kept`` are booleans ``(b, p, i, j)`` or None.
    """
    counts, indices = _empty_lists(scores)
    batch, heads, rows, columns = scores.shape
    if counts.numel() == 0:
        return counts, indices
    if columns == 0:
        return counts.zero_(), indices
    scores, rule = rows_of(scores), rule.contiguous()
    own, steps = rule, (0, 0, 0)
    if own_thresholds is not None:
        own = own_thresholds.float()
        steps = (*plane_strides(own), own.stride(2) if own.shape[2] > 1 else 0)
    c = max(triton.next_power_of_2(columns), 32)
    with on_device(scores.device):
        threshold_kernel[(rows * batch * heads,)](
            scores, *scores.stride()[:3], rule, batch_stride(rule), counts, indices, threshold,
            own, *steps, rule if kept is None else kept.contiguous().view(torch.uint8),
            rows, columns, heads, columns, C=c, W=c, EVEN=columns % 16 == 0,
            OWN=own_thresholds is not None, KEPT=kept is not None,
            num_warps=min(max(c // 512, 1), 32), **overlap(scores.device),
        )  # fmt: skip
    return counts, indices


@threshold_op.register_fake
def _empty_lists(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    return counts, scores.new_empty(scores.shape, dtype=torch.int32)


@triton.jit
def _scored(source, entries, lane, head, columns, heads, low, end, sink_end, near_first, near_end,
            LISTS: tl.constexpr):  # fmt: skip
    """Scores of all heads at some places, ``(H, T)``; -inf where nothing may be chosen by score."""
    inside = (head < heads)[:, None] & (lane < columns)[None, :]
    column = lane[None, :]
    if LISTS:
        column = tl.load(entries + lane[None, :], mask=inside, other=-1)
    visible = inside & (column >= low) & (column < end)
    forced = (column < sink_end) | ((column >= near_first) & (column < near_end))
    scored = visible & (forced == 0)
    score = tl.load(source + lane[None, :], mask=scored, other=0.0).to(tl.float32)
    score = tl.maximum(tl.where(score == score, score, -_LIMIT), -_LIMIT)
    return tl.where(scored, score, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def above_kernel(
    scores, s_stride_b, s_stride_h, s_stride_i,
    candidates, c_stride_b, c_stride_h, c_stride_i,
    rows, r_stride_b, threshold, most, m_stride_b, m_stride_h, weights, counts,
    num_rows, columns, heads,
    H: tl.constexpr, T: tl.constexpr, LISTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of all heads, or of one (H = 1): softmax over its scored candidates, then counts.

    Heads of one program compete: n others that expect strictly more of a block leave ``e**-n`` of
    its mass. Two passes over the columns, T at a time.
    """
    follow(PDL)
    row = tl.program_id(0) % num_rows
    group = tl.cast(tl.program_id(0) // num_rows, tl.int64)
    groups = (heads + H - 1) // H
    batch = group // groups
    head = group % groups * H + tl.arange(0, H)
    low, end, sink_end, near_first, near_end = load_rule(rows, r_stride_b, batch, row, num_rows)
    source = scores + batch * s_stride_b + head[:, None] * s_stride_h
    source += tl.cast(row, tl.int64) * s_stride_i
    entries = candidates + batch * c_stride_b + head[:, None] * c_stride_h
    entries += tl.cast(row, tl.int64) * c_stride_i
    first = 0
    last = columns
    if not LISTS:
        first = low
        last = tl.minimum(end, columns)
    lane = tl.arange(0, T)
    cut = tl.load(threshold)
    weight = tl.load(weights + head, mask=head < heads, other=0.0)
    count = tl.zeros((H,), tl.int32)
    if cut < _OFF:
        options = tl.zeros((H,), tl.float32)
        peak = tl.full((H,), -_LIMIT, tl.float32)
        total = tl.zeros((H,), tl.float32)
        for start in range(first, last, T):
            score = _scored(
                source, entries, start + lane, head, columns, heads, low, end, sink_end,
                near_first, near_end, LISTS,
            )  # fmt: skip
            options += tl.sum((score > float("-inf")).to(tl.float32), 1)
            higher = tl.minimum(tl.maximum(peak, tl.max(score, 1)), _LIMIT)
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
            peak = higher
        # With an infinite score no block has any mass, as in PyTorch.
        known = (total > 0.0) & (total < float("inf"))
        total = tl.where(known, total, 1.0)
        many = tl.sqrt_rn(tl.sqrt_rn(tl.maximum(options, 1.0) / 16.0))
        reach = tl.div_rn(cut, many)[:, None]
        for start in range(first, last, T):
            score = _scored(
                source, entries, start + lane, head, columns, heads, low, end, sink_end,
                near_first, near_end, LISTS,
            )  # fmt: skip
            mass = tl.div_rn(tl.exp(score - peak[:, None]), total[:, None])
            mass = tl.where(known[:, None] & (score > float("-inf")), mass * weight[:, None], 0.0)
            # Who has more of a block than a head that reaches the threshold reaches it too.
            if tl.max(tl.max((mass >= reach).to(tl.int32), 1), 0) > 0:
                expected = mass
                if H > 1:
                    above = tl.zeros((H, T), tl.float32)
                    for other in range(heads):
                        theirs = tl.sum(tl.where((head == other)[:, None], mass, 0.0), 0)
                        above += (theirs[None, :] > mass).to(tl.float32)
                    expected = mass * tl.exp(-above)
                reached = (expected >= reach) & (score > float("-inf"))
                count += tl.sum(reached.to(tl.int32), 1)
    real = head < heads
    bound = tl.load(most + batch * m_stride_b + head * m_stride_h + row, mask=real, other=0)
    place = (batch * heads + head) * num_rows + row
    tl.store(counts + place, tl.minimum(count, bound), mask=real)


@torch.library.custom_op(f"{NAMESPACE}::blocks_above", mutates_args=())
def above_op(
    scores: Tensor, candidates: Tensor | None, rule: Tensor, threshold: Tensor, most: Tensor,
    weights: Tensor,
) -> Tensor:  # fmt: skip
    """Counts ``(b, p, i)`` int32 of the blocks above a threshold, at most ``most``. No gradient.

    ``scores`` are ``(b, p, i, c)``; ``candidates`` ``(1 or b, 1 or p, i, c)`` int32, negative past
    the last, or None: then column c is key block c, and the heads compete; ``rule`` is
    ``(1 or b, 5, i)`` and ``most`` ``(1 or b, 1 or p, i)``, int32; ``weights`` ``(p,)`` float32.
    """
    counts = _empty_counts(scores)
    batch, heads, rows, columns = scores.shape
    if counts.numel() == 0:
        return counts
    if columns == 0:
        return counts.zero_()
    scores, rule, most = rows_of(scores), rule.contiguous(), most.contiguous()
    weights = weights.contiguous()
    lists: tuple[Any, ...] = (rule, 0, 0, 0)
    if candidates is not None:
        candidates = rows_of(candidates)
        lists = (candidates, *plane_strides(candidates), candidates.stride(2))
    # Heads that compete share a program.
    together = heads if candidates is None else 1
    h = triton.next_power_of_2(together)
    t = max(min(_TILE // h, triton.next_power_of_2(columns)), 32)
    with on_device(scores.device):
        above_kernel[(rows * batch * (heads // together),)](
            scores, *scores.stride()[:3], *lists, rule, batch_stride(rule), threshold,
            most, *plane_strides(most), weights, counts, rows, columns, heads,
            H=h, T=t, LISTS=candidates is not None,
            num_warps=min(max(h * t // 1024, 1), 4), **overlap(scores.device),
        )  # fmt: skip
    return counts


@above_op.register_fake
def _empty_counts(scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(scores.shape[:3], dtype=torch.int32)
