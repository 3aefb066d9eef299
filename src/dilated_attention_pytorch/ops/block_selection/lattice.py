"""The candidates of segments: LongNet's lattice at the level of blocks, listed row by row.

A row with the diagonal block o, which sees the blocks from ``low`` on, has as candidates its sinks,
the neighbours of the diagonal, and for each group (segment s in blocks, rate r) the blocks j of its
own segment ``(j - low) // s == (o - low) // s`` with ``(j - low) % s % r == head % r``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_selection.choice import load_rule
from dilated_attention_pytorch.ops.operators import NAMESPACE
from dilated_attention_pytorch.ops.triton_device import VARYING, batch_stride, on_device


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
    low, end, sink_end, near_first, near_end = load_rule(rows, r_stride_b, batch, row, num_rows)
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


@torch.library.custom_op(f"{NAMESPACE}::lattice_candidates", mutates_args=())
def lattice_op(
    rule: Tensor,
    diagonal: Tensor,
    segments: list[int],
    rates: list[int],
    heads: int,
    sinks: int,
    near: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending candidates ``(1 or b, p, i, c)`` int32 (-1: none), forced and all per row."""
    candidates, forced, limit = _empty(rule, diagonal, segments, rates, heads, sinks, near)
    batch, _, rows, width = candidates.shape
    if candidates.numel() == 0:
        return candidates, forced.zero_(), limit.zero_()
    rule, diagonal = rule.contiguous(), diagonal.contiguous()
    groups = tuple(x for group in zip(segments, rates, strict=True) for x in group)
    c = max(triton.next_power_of_2(width), 16)
    with on_device(candidates.device):
        lattice_kernel[(rows * batch * heads,)](
            rule, batch_stride(rule), diagonal, batch_stride(diagonal), candidates, forced, limit,
            rows, heads, width, sinks, near, GROUPS=groups, C=c,
            num_warps=min(max(c // 128, 1), 8),
        )  # fmt: skip
    return candidates, forced, limit


@lattice_op.register_fake
def _empty(
    rule: Tensor, _: Any, segments: list[int], rates: list[int], heads: int, sinks: int, near: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, i = rule.shape
    lattice = sum(ceil_div(s, r) for s, r in zip(segments, rates, strict=True))
    candidates = rule.new_empty(b, heads, i, sinks + near + lattice)
    return candidates, rule.new_empty(b, heads, i), rule.new_empty(b, heads, i)
