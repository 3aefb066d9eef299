"""The kernel that keeps the blocks of a row whose expected mass reaches a threshold."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_selection.triton_kernels.choice import _running_count
from dilated_attention_pytorch.ops.block_selection.triton_kernels.shared import VARYING, follow

_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit(do_not_specialize=VARYING)
def threshold_kernel(
    scores, s_stride_b, s_stride_h, s_stride_i, rows, r_stride_b, counts, indices, threshold,
    own_thresholds, t_stride_b, t_stride_h, t_stride_i, num_rows, columns, heads, width,
    C: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, OWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax over what a row sees; the packed ascending list of forced and likely blocks.

    What reaches a threshold needs no ranking: of equal scores all do or none does. ``OWN``:
    heads or rows have thresholds of their own.
    """
    follow(PDL)
    row = tl.program_id(0) % num_rows
    plane = tl.cast(tl.program_id(0) // num_rows, tl.int64)
    batch = plane // heads
    if EVEN:
        # So that the compiler knows, and reads four scores at once.
        columns = columns // 16 * 16
    rule = rows + batch * r_stride_b + row
    low = tl.load(rule)
    end = tl.minimum(tl.load(rule + num_rows), columns)
    sink_end = tl.load(rule + 2 * num_rows)
    near_first = tl.load(rule + 3 * num_rows)
    near_end = tl.load(rule + 4 * num_rows)
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
    if OWN:
        place = batch * t_stride_b + plane % heads * t_stride_h + row * t_stride_i
        threshold = tl.load(own_thresholds + place)
    every = (visible & (forced | (likely >= threshold))).to(tl.int32)
    slot = _running_count(every, C) - 1
    count = tl.minimum(tl.sum(every, 0), width)
    place = plane * num_rows + row
    tl.store(counts + place, count)
    tl.store(indices + place * width + slot, column, mask=(every > 0) & (slot < width))
    rest = tl.arange(0, W)
    unused = (rest >= count) & (rest < width)
    tl.store(indices + place * width + rest, rest * 0, mask=unused)
