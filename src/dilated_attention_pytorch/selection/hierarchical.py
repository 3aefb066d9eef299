"""Choosing in levels: super-blocks first, then what lies inside the chosen ones.

With ``hierarchy=(4, 2)`` and 16 key blocks, level 2 has two super-blocks of eight blocks, level 1
four of four blocks::

    level 2   [        0        |        1        ]     all scored, the best kept
    level 1   [   0    |   1    |   2    |   3    ]     scored inside the kept ones
    blocks     0 1 2 3  4 5 6 7  8 9 . . . . . . .      scored inside the kept ones
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.selection.mass_target import mass_target_gradient


def coarse_summaries(summaries: Tensor, size: int, pooling: Sequence[str]) -> Tensor:
    """Summaries of super-blocks from those of their blocks: means of means, maxima of maxima.

    Args:
        summaries: ``(batch, j, heads, s)``, the poolings side by side.
        size: Blocks per super-block; the last may be partial.
        pooling: Names of the poolings.

    Returns:
        ``(batch, ceil(j / size), heads, s)``.
    """
    batch, blocks, heads, _ = summaries.shape
    groups = ceil_div(blocks, size)
    pad = groups * size - blocks
    parts = []
    for name, part in zip(pooling, summaries.chunk(len(pooling), -1), strict=True):
        fill = {"max": -torch.inf, "min": torch.inf}.get(name, 0.0)
        tiles = F.pad(part, (0, 0, 0, 0, 0, pad), value=fill)
        tiles = tiles.reshape(batch, groups, size, heads, part.shape[-1])
        if name == "max":
            parts.append(tiles.amax(2))
        elif name == "min":
            parts.append(tiles.amin(2))
        else:
            count = torch.full((groups, 1, 1), size, device=part.device, dtype=part.dtype)
            count[-1:] = size - pad
            parts.append(tiles.sum(2) / count)
    return torch.cat(parts, -1)


def coarse_intervals(intervals: Tensor, size: int) -> Tensor:
    """:meth:`CandidateRule.intervals` in super-blocks: whatever touches one takes in all of it.

    A super-block that a causal row sees in part holds its diagonal block and so is forced: no
    choice depends on the summary of blocks that the row does not see.
    """
    low, end, sink_end, near_first, near_end = intervals.unbind(1)

    def down(x: Tensor) -> Tensor:
        return x.div(size, rounding_mode="floor")

    def up(x: Tensor) -> Tensor:
        return down(x + size - 1)

    near_first = torch.maximum(near_first, low)
    near_end = torch.minimum(near_end, end)
    empty = torch.zeros_like(low)
    near = near_end > near_first
    first, last = down(low), torch.where(end > low, up(end), down(low))
    return torch.stack(
        [
            first,
            last,
            torch.where(sink_end > low, up(sink_end), first),
            torch.where(near, down(near_first), empty),
            torch.where(near, up(near_end), empty),
        ],
        1,
    ).int()


def children(counts: Tensor, indices: Tensor, size: int, limit: int) -> Tensor:
    """What lies inside the chosen super-blocks.

    Args:
        counts: ``(b, h, i)``: chosen super-blocks per row.
        indices: ``(b, h, i, k)``: their numbers, ascending.
        size: Children per super-block.
        limit: How many children there are in all.

    Returns:
        Their numbers, int32 ``(b, h, i, k * size)``; -1 where there is none. Place
        ``slot * size + r`` holds child r of the super-block in that slot.
    """
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    child = indices[..., None] * size + torch.arange(size, device=indices.device)
    child = torch.where(used[..., None] & (child < limit), child, -1)
    return child.flatten(-2).int()


def parent_slots(counts: Tensor, indices: Tensor, child: Tensor, size: int) -> Tensor:
    """The slot of each child's super-block in the chosen list, int64 shaped like ``child``."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # Ascending to the end, as the search needs.
    filled = torch.where(used, indices, torch.iinfo(torch.int32).max).contiguous()
    parent = child.div(size, rounding_mode="floor").int().contiguous()
    return torch.searchsorted(filled, parent).clamp(max=indices.shape[-1] - 1)


def grouped_mass_probe(
    scores: Tensor, scored: Tensor, slots: Tensor, counted: Tensor, weight: float
) -> Tensor:
    """:func:`mass_target_probe` for super-blocks: their target is the mass of their tiles.

    Args:
        scores: ``(b, h, i, s)``: scores of the chosen super-blocks.
        scored: Booleans of the same shape: chosen by score or at random, not forced.
        slots: ``(b, h, i, k)`` int64: the super-block of each kept tile.
        counted: Booleans ``(b, h, i, k)``: tiles whose mass counts.
        weight: λ over the rows that the signal is averaged over.

    Returns:
        Zeros ``(b, h, i, k)`` float32 that carry the gradient.
    """
    return _GroupedMass.apply(scores, scored, slots, counted, weight)


class _GroupedMass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, scored: Tensor, slots: Tensor, counted: Tensor, weight: float
    ) -> Tensor:
        ctx.save_for_backward(scores, scored, slots, counted)
        ctx.weight = weight
        return torch.zeros(slots.shape, dtype=torch.float32, device=scores.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mass: Tensor) -> tuple[Tensor, None, None, None, None]:
        scores, scored, slots, counted = ctx.saved_tensors
        mass = mass.float().masked_fill(~counted, 0)
        grouped = torch.zeros(scores.shape, dtype=torch.float32, device=scores.device)
        grouped.scatter_add_(-1, slots, mass)
        return mass_target_gradient(scores, scored, grouped, ctx.weight), None, None, None, None


def pairs_per_row(num_key_blocks: int, hierarchy: Sequence[int], kept: int, forced: int = 1) -> int:
    """Pairs that one row scores at most, of all levels together.

    Args:
        num_key_blocks: Key blocks, j.
        hierarchy: Children per super-block, from the finest level up.
        kept: Super-blocks kept by score on every level.
        forced: Super-blocks that are kept in any case.

    Example:
        >>> pairs_per_row(512, (16,), 5), pairs_per_row(512, (8, 8), 4), pairs_per_row(512, (), 0)
        (128, 88, 512)
    """
    counts = [num_key_blocks]
    for size in hierarchy:
        counts.append(ceil_div(counts[-1], size))
    total = counts[-1]
    for level, size in reversed(list(enumerate(hierarchy))):
        total += min((kept + forced) * size, counts[level])
    return total
