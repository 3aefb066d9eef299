"""The choice of blocks: forced ones, the best by score, and some at random; row by row.

A row takes its forced blocks, those of the highest ``score + temperature · Gumbel noise`` (ties to
the lower place) up to its budget, and of the others some drawn uniformly: ``explore``, one less for
each that it took by score but the first, at least one. The cut is found by bisection: on the
floats' range, then on integers that order like them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.ops.operators import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.triton_device import (
    VARYING,
    batch_stride,
    follow,
    on_device,
    overlap,
    plane_strides,
)

# Integer keys that order like float32 end at those of -inf and inf: one below for what may not be
# chosen, one above for what must be.
KEY_OF_FORBIDDEN = tl.constexpr(-2139095042)
KEY_OF_FORCED = tl.constexpr(2147483647)


@triton.jit
def load_rule(rows, stride_b, batch, row, num_rows):
    """What a row may and must read, see the package: its five numbers."""
    rule = rows + batch * stride_b + row
    low = tl.load(rule)
    end = tl.load(rule + num_rows)
    sink_end = tl.load(rule + 2 * num_rows)
    near_first = tl.load(rule + 3 * num_rows)
    near_end = tl.load(rule + 4 * num_rows)
    return low, end, sink_end, near_first, near_end


@triton.jit
def order(score):
    """Integers that order like the floats; -0 equals 0, NaN equals -inf."""
    # -0 + 0 is 0.
    bits = (tl.where(score == score, score, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    """The float that :func:`order` gave ``key``; infinities as large numbers."""
    number = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(number, -3.0e38), 3.0e38)


@triton.jit
def running_count(flag, C: tl.constexpr):
    """How many flags (0 or 1) are set up to and including each place."""
    # A scan costs five exchanges between threads for every 32 places: four parts are scanned
    # at once, in the bytes of an integer.
    PARTS: tl.constexpr = 4 if C >= 128 else 1
    GROUPS: tl.constexpr = C // (32 * PARTS)
    byte = tl.arange(0, PARTS) * 8
    packed = tl.sum(tl.reshape(flag, (PARTS, GROUPS, 32)) << byte[:, None, None], 0)
    inside = (tl.cumsum(packed, 1)[None, :, :] >> byte[:, None, None]) & 0xFF
    whole = (tl.sum(packed, 1)[None, :] >> byte[:, None]) & 0xFF
    whole = tl.reshape(whole, (PARTS * GROUPS,))
    before = tl.reshape(tl.cumsum(whole, 0) - whole, (PARTS, GROUPS))
    return tl.reshape(inside + before[:, :, None], (C,))


@triton.jit
def highest(key, count, low, many, high, few, C: tl.constexpr, FLOATS: tl.constexpr):
    """The ``count`` highest keys, ties to the lower place: booleans.

    Bisection on the value of the last one taken; it ends early when a cut fits exactly.
    ``many >= count`` keys reach ``low``, and ``few <= count`` reach ``high``.
    """
    low = tl.where(few == count, high, low)
    high = tl.where(many == count, low, high)
    reached = tl.where(many == count, count, few)
    if FLOATS:
        # Halving the floats' range skips the exponents that no score has. Outliers would make it
        # slow, halving the keys' range takes 32 steps at most: so that has the last word.
        floor = _number(low)
        ceiling = _number(high - 1)
        halvings = tl.where(low < high, 12, 0)
        while halvings > 0:
            mean = 0.5 * floor + 0.5 * ceiling
            bits = mean.to(tl.int32, bitcast=True)
            middle = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            between = (middle > low) & (middle < high)
            middle = tl.where(between, middle, low + 1)
            reached = tl.sum((key >= middle).to(tl.int32), 0)
            enough = reached >= count
            floor = tl.where(enough, mean, floor)
            low = tl.where(enough, middle, low)
            ceiling = tl.where(enough, ceiling, mean)
            high = tl.where(enough, high, middle)
            high = tl.where(reached == count, low, high)
            halvings = tl.where(between & (low < high), halvings - 1, 0)
    while low + 1 < high:
        # The mean without overflow.
        middle = (low & high) + ((low ^ high) >> 1)
        reached = tl.sum((key >= middle).to(tl.int32), 0)
        high = tl.where(reached < count, middle, high)
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached == count, low, high)
    chosen = key >= low
    if reached != count:
        # Only now may more keys reach the cut than are wanted.
        above = key > low
        tied = key == low
        missing = count - tl.sum(above.to(tl.int32), 0)
        chosen = above | (tied & (running_count(tied.to(tl.int32), C) <= missing))
    return chosen


@triton.jit
def _bits_to_uniform(bits):
    """Uniform numbers strictly between 0 and 1 from 32 random bits (23 are used)."""
    return ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit(do_not_specialize=VARYING)
def choose_kernel(
    scores, s_stride_b, s_stride_h, s_stride_i,
    candidates, c_stride_b, c_stride_h, c_stride_i,
    rows, r_stride_b, budget, seed, temperature,
    counts, indices, kept, scored,
    num_rows, columns, heads, fixed_count, explore, width,
    C: tl.constexpr, W: tl.constexpr, LISTS: tl.constexpr, BUDGET: tl.constexpr,
    NOISE: tl.constexpr, EXPLORE: tl.constexpr, KEPT: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Top-k of one row, forced and random blocks; writes the packed ascending list."""
    follow(PDL)
    row = tl.program_id(0) % num_rows
    plane = tl.cast(tl.program_id(0) // num_rows, tl.int64)
    batch = plane // heads
    head = plane % heads
    if EVEN:
        # So that the compiler knows, and reads four scores at once.
        columns = columns // 16 * 16
    place = plane * num_rows + row
    low, end, sink_end, near_first, near_end = load_rule(rows, r_stride_b, batch, row, num_rows)
    wanted = fixed_count
    if BUDGET:
        wanted = tl.load(budget + place)
    lane = tl.arange(0, C)
    source = scores + batch * s_stride_b + head * s_stride_h + tl.cast(row, tl.int64) * s_stride_i
    score = tl.load(source + lane, mask=lane < columns, other=0.0).to(tl.float32)
    column = lane
    if LISTS:
        entries = candidates + batch * c_stride_b + head * c_stride_h
        entries += tl.cast(row, tl.int64) * c_stride_i
        column = tl.load(entries + lane, mask=lane < columns, other=-1).to(tl.int32)
    else:
        end = tl.minimum(end, columns)
    ranked = score
    if NOISE:
        plane_word = lane * 0 + (plane & 0x7FFFFFFF).to(tl.int32)
        stream = tl.load(seed)
        gumbel_bits, lottery_bits, _a, _b = tl.philox(
            stream, lane, lane * 0 + row, plane_word, lane * 0
        )
        uniform = _bits_to_uniform(gumbel_bits)
        ranked = score - tl.log(-tl.log(uniform)) * tl.load(temperature)
    end = tl.maximum(end, low)
    near_end = tl.maximum(near_end, near_first)
    # Of unsigned differences those of lower columns are large: one comparison for both ends.
    visible = (column - low).to(tl.uint32) < (end - low).to(tl.uint32)
    near = (column - near_first).to(tl.uint32) < (near_end - near_first).to(tl.uint32)
    # Forced blocks rank above all others: one choice finds both.
    key = tl.where((column < sink_end) | near, KEY_OF_FORCED, order(ranked))
    key = tl.where(visible, key, KEY_OF_FORBIDDEN)
    if LISTS:
        must = tl.sum((key == KEY_OF_FORCED).to(tl.int32), 0)
        seen = tl.sum(visible.to(tl.int32), 0)
    else:
        sink_end = tl.minimum(tl.maximum(sink_end, low), end)
        must = tl.minimum(near_end, end) - tl.maximum(near_first, sink_end)
        must = sink_end - low + tl.maximum(must, 0)
        seen = end - low
    if BUDGET:
        wanted = tl.maximum(wanted, must)
    else:
        wanted += must
    # Past the highest key but for the forced ones, which wrap around; the lowest visible one.
    high = tl.max(key + 1, 0)
    lowest = tl.min(tl.where(visible, key, KEY_OF_FORCED), 0)
    wanted = tl.minimum(wanted, seen)
    chosen = highest(key, wanted, lowest, seen, high, must, C, True)
    if EXPLORE:
        left = visible & (chosen == 0)
        # One bit less than would fit: a cut lies above the highest ticket.
        ticket = tl.where(left, (lottery_bits >> 2).to(tl.int32), -1)
        rest = tl.sum(left.to(tl.int32), 0)
        extra = tl.minimum(explore, tl.maximum(explore + 1 - (wanted - must), 1))
        extra = tl.minimum(rest, extra)
        chosen |= highest(ticket, extra, 0, rest, tl.max(ticket, 0) + 1, 0, C, False)
    every = chosen.to(tl.int32)
    slot = running_count(every, C) - 1
    take = (every > 0) & (slot < width)
    count = tl.minimum(tl.sum(every, 0), width)
    tl.store(counts + place, count)
    first = place * width
    tl.store(indices + first + slot, column, mask=take)
    rest = tl.arange(0, W)
    unused = (rest >= count) & (rest < width)
    tl.store(indices + first + rest, rest * 0, mask=unused)
    if KEPT:
        tl.store(kept + first + slot, score, mask=take)
        tl.store(scored + first + slot, (key != KEY_OF_FORCED).to(tl.uint8), mask=take)
        tl.store(kept + first + rest, rest.to(tl.float32) * 0.0, mask=unused)
        tl.store(scored + first + rest, (rest * 0).to(tl.uint8), mask=unused)


@torch.library.custom_op(f"{NAMESPACE}::choose_blocks", mutates_args=())
def choose_op(
    scores: Tensor, candidates: Tensor | None, rule: Tensor, budget: Tensor | None,
    seed: Tensor | None, temperature: Tensor | None, fixed_count: int, explore: int, width: int,
    want_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Counts, lists, and (if wanted) the kept tiles' scores and whether each was not forced.

    Args:
        scores: ``(b, p, i, c)`` float32.
        candidates: ``(1 or b, 1 or p, i, c)`` int32, or None: column c is key block c.
        rule: ``(1 or b, 5, i)`` int32.
        budget: ``(b, p, i)`` int32, forced blocks included, or None: see ``fixed_count``.
        seed: 0-dim int64, or None: no noise and no random blocks.
        temperature: 0-dim float32, of the noise.
        fixed_count: Scored blocks of every row without a ``budget``.
        explore: Random blocks of a row that chooses one or none; each further one is one less,
            down to one. 0: none.
        width: Length of the lists.
        want_kept: Whether scores are wanted; without, those results are empty.
    """
    counts, indices, kept, scored = results = _empty_choice(scores, width, want_kept)
    batch, heads, rows, columns = scores.shape
    if counts.numel() == 0:
        return results
    if width == 0 or columns == 0:
        counts.zero_()
        return results
    scores, rule = rows_of(scores), rule.contiguous()
    c = max(triton.next_power_of_2(columns), 32)
    lists = (0, 0, 0) if candidates is None else (*plane_strides(candidates), candidates.stride(2))
    with on_device(counts.device):
        choose_kernel[(rows * batch * heads,)](
            scores, *scores.stride()[:3], rule if candidates is None else candidates, *lists,
            rule, batch_stride(rule), counts if budget is None else budget.contiguous(),
            rule if seed is None else seed, scores if temperature is None else temperature,
            counts, indices, kept if want_kept else indices,
            scored.view(torch.uint8) if want_kept else indices,
            rows, columns, heads, fixed_count, explore, width,
            C=c, W=triton.next_power_of_2(width), LISTS=candidates is not None,
            BUDGET=budget is not None, NOISE=seed is not None,
            EXPLORE=seed is not None and explore > 0, KEPT=want_kept, EVEN=columns % 16 == 0,
            # 32 programs of one warp fit on a multiprocessor, if their registers do.
            maxnreg=64 if c <= 512 else None,
            num_warps=min(max(c // 512, 1), 32), **overlap(counts.device),
        )  # fmt: skip
    return results


def _empty_choice(
    scores: Tensor, width: int, want_kept: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = scores.shape[:3]
    side = (*rows, width) if want_kept else (0,)
    return (
        scores.new_empty(rows, dtype=torch.int32),
        scores.new_empty((*rows, width), dtype=torch.int32),
        scores.new_empty(side, dtype=torch.float32),
        scores.new_empty(side, dtype=torch.bool),
    )


@choose_op.register_fake
def _(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_choice(scores, *rest[-2:])
