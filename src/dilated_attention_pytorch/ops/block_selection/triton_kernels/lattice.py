"""The kernel that lists the candidates of segments."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_selection.triton_kernels.shared import VARYING


@triton.jit(do_not_specialize=VARYING)
def lattice_kernel(
    rows, r_stride_b, diagonal, d_stride_b, candidates, forced_count, limit,
    num_rows, heads, width, sinks, near, GROUPS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Lists the candidates of one row: sinks, neighbours of the diagonal, lattice; ascending.

    ``GROUPS`` holds (blocks of a segment, rate) for each group, flattened. A block that an earlier
    part lists is left out of the later ones, by arithmetic.
    """
    row = tl.program_id(0) % num_rows
    plane = tl.cast(tl.program_id(0) // num_rows, tl.int64)
    batch = plane // heads
    head = (plane % heads).to(tl.int32)
    rule = rows + batch * r_stride_b + row
    low = tl.load(rule)
    end = tl.load(rule + num_rows)
    sink_end = tl.load(rule + 2 * num_rows)
    near_first = tl.load(rule + 3 * num_rows)
    near_end = tl.load(rule + 4 * num_rows)
    own = tl.load(diagonal + batch * d_stride_b + row).to(tl.int32)
    lane = tl.arange(0, C)
    NONE: tl.constexpr = 0x7FFFFFFF
    found = tl.where((lane < sinks) & (low + lane < sink_end), low + lane, NONE)
    local = near_first + lane - sinks
    is_near = (lane >= sinks) & (lane < sinks + near) & (local < near_end) & (local >= sink_end)
    found = tl.where(is_near & (local >= low), local, found)
    first = sinks + near
    for group in tl.static_range(0, len(GROUPS), 2):
        segment = GROUPS[group]
        rate = GROUPS[group + 1]
        number = (segment + rate - 1) // rate
        inside = (lane - first) * rate + head % rate
        # Rows that see nothing may lie before their range: the clamp keeps the division simple.
        start = tl.maximum(own - low, 0) // segment * segment
        j = low + start + inside
        listed = (lane >= first) & (lane < first + number) & (inside < segment)
        listed = listed & (j >= sink_end) & ((j < near_first) | (j >= near_end))
        for earlier in tl.static_range(0, group, 2):
            other = GROUPS[earlier]
            other_rate = GROUPS[earlier + 1]
            same = (j - low) // other == tl.maximum(own - low, 0) // other
            same = same & ((j - low) % other % other_rate == head % other_rate)
            listed = listed & (same == 0)
        found = tl.where(listed, j, found)
        first += number
    found = tl.where((found >= low) & (found < end), found, NONE)
    must = (found < sink_end) | ((found >= near_first) & (found < near_end))
    ordered = tl.sort(found)
    place = plane * num_rows + row
    tl.store(
        candidates + place * width + lane, tl.where(ordered == NONE, -1, ordered),
        mask=lane < width,
    )  # fmt: skip
    there = found != NONE
    tl.store(limit + place, tl.sum(there.to(tl.int32), 0))
    tl.store(forced_count + place, tl.sum((there & must).to(tl.int32), 0))
