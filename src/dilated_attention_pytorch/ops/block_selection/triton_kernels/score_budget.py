"""The kernel that counts the blocks of a row whose expected mass reaches a threshold."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_selection.triton_kernels.shared import VARYING, follow

# Differences of numbers within it are finite.
_LIMIT = tl.constexpr(1.0e38)


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
    rows, r_stride_b, threshold, most, m_stride_b, m_stride_h, counts,
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
    rule = rows + batch * r_stride_b + row
    low = tl.load(rule)
    end = tl.load(rule + num_rows)
    sink_end = tl.load(rule + 2 * num_rows)
    near_first = tl.load(rule + 3 * num_rows)
    near_end = tl.load(rule + 4 * num_rows)
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
    count = tl.zeros((H,), tl.int32)
    # No mass is larger than 1.
    if cut <= 1.0:
        peak = tl.full((H,), -_LIMIT, tl.float32)
        total = tl.zeros((H,), tl.float32)
        for start in range(first, last, T):
            score = _scored(
                source, entries, start + lane, head, columns, heads, low, end, sink_end,
                near_first, near_end, LISTS,
            )  # fmt: skip
            higher = tl.minimum(tl.maximum(peak, tl.max(score, 1)), _LIMIT)
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
            peak = higher
        # With an infinite score no block has any mass, as in PyTorch.
        known = (total > 0.0) & (total < float("inf"))
        total = tl.where(known, total, 1.0)
        for start in range(first, last, T):
            score = _scored(
                source, entries, start + lane, head, columns, heads, low, end, sink_end,
                near_first, near_end, LISTS,
            )  # fmt: skip
            mass = tl.div_rn(tl.exp(score - peak[:, None]), total[:, None])
            mass = tl.where(known[:, None] & (score > float("-inf")), mass, 0.0)
            # What has more of a block than one that reaches the threshold reaches it too.
            if tl.max(tl.max(mass, 1), 0) >= cut:
                expected = mass
                if H > 1:
                    above = tl.zeros((H, T), tl.float32)
                    for other in range(heads):
                        theirs = tl.sum(tl.where((head == other)[:, None], mass, 0.0), 0)
                        above += (theirs[None, :] > mass).to(tl.float32)
                    expected = mass * tl.exp(-above)
                reached = (expected >= cut) & (score > float("-inf"))
                count += tl.sum(reached.to(tl.int32), 1)
    real = head < heads
    bound = tl.load(most + batch * m_stride_b + head * m_stride_h + row, mask=real, other=0)
    place = (batch * heads + head) * num_rows + row
    tl.store(counts + place, tl.minimum(count, bound), mask=real)
