"""Choosing in levels: super-blocks first, then what lies inside the chosen ones.

With ``hierarchy=(4, 2)`` and 16 key blocks, level 2 has two super-blocks of eight blocks, level 1
four of four blocks::

    level 2   [        0        |        1        ]     all scored, the best kept
    level 1   [   0    |   1    |   2    |   3    ]     scored inside the kept ones
    blocks     0 1 2 3  4 5 6 7  8 9 . . . . . . .      scored inside the kept ones
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dilated_attention_pytorch.selection.mass_target import mass_target_gradient


@dataclass(frozen=True, eq=False)
class SuperBlocks:
    """One level of super-blocks over the blocks (or super-blocks) of the level below.

    Every document begins a new one, and padding is in none, so that a document has the same
    super-blocks packed, padded and alone. With ``size=2``, documents of 3 and 2 blocks::

        below        0 1 2 | 3 4
        super-block  0 0 1 | 2 2

    Attributes:
        size: The most that a super-block holds.
        first: ``(1 or b, p)`` int64: the first that each holds.
        count: ``(1 or b, p)`` int64: how many it holds; 0 for those that there are not.
        parent: ``(1 or b, c)`` int64, ascending: where each of the level below lies.
        number: ``(1 or b, p)`` int64: the super-block's place in its document.
        real: ``(1 or b, c)`` booleans: which of the level below are no padding.
    """

    size: int
    first: Tensor
    count: Tensor
    parent: Tensor
    number: Tensor
    real: Tensor

    @classmethod
    def of(cls, number: Tensor, real: Tensor, size: int, num_documents: int) -> SuperBlocks:
        """Groups what lies below. Does not wait for the device.

        Args:
            number: ``(1 or b, c)`` int64: the place of each in its document.
            real: Booleans of the same shape: no padding.
            size: Of the level.
            num_documents: An upper bound of the documents.
        """
        below = number.shape[1]
        # Every document can have one that is not full.
        most = min((below + num_documents * (size - 1)) // size, below)
        parent = ((number % size == 0).cumsum(1) - 1).clamp(0, max(most - 1, 0))
        each = torch.arange(most, device=number.device).expand(number.shape[0], -1).contiguous()
        first = torch.searchsorted(parent, each)
        count = torch.searchsorted(parent, each, right=True) - first
        own = look_up(number, first).div(size, rounding_mode="floor")
        # Those that there are not begin nothing on the next level.
        return cls(size, first, count, parent, torch.where(count > 0, own, 1), real)

    def inside(self) -> tuple[Tensor, Tensor]:
        """What each holds, ``(1 or b, p, size)`` int64, and which of these are there and real."""
        step = torch.arange(self.size, device=self.first.device)
        child = self.first[..., None] + step
        return child, (step < self.count[..., None]) & look_up(self.real, child)

    def coarse_real(self) -> Tensor:
        """Booleans ``(1 or b, p)``: super-blocks that hold anything real."""
        return self.inside()[1].any(-1)


@dataclass(frozen=True, eq=False)
class ChosenLevel:
    """Super-blocks that one level kept.

    Attributes:
        owner: ``(1 or b, j)`` int64: the super-block of each block.
        counts: ``(b, p, i)`` int32.
        indices: ``(b, p, i, k)`` int32, ascending.
        scores: ``(b, p, i, k)``: theirs, differentiable.
        scored: Booleans: not forced.
    """

    owner: Tensor
    counts: Tensor
    indices: Tensor
    scores: Tensor
    scored: Tensor


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries ``(b, ...)`` of ``(1 or b, n)`` at ``index``, clamped to the table."""
    if table.shape[1] == 0 or index.numel() == 0:
        return table.new_zeros(index.shape)
    place = index.flatten(1).long().clamp(0, table.shape[1] - 1)
    batch = max(table.shape[0], place.shape[0])
    found = table.expand(batch, -1).gather(1, place.expand(batch, -1))
    return found.view(batch, *index.shape[1:])


def coarse_summaries(summaries: Tensor, level: SuperBlocks, pooling: Sequence[str]) -> Tensor:
    """Summaries of super-blocks from those of their blocks: means of means, maxima of maxima.

    Args:
        summaries: ``(batch, j, heads, s)``, the poolings side by side.
        level: Which blocks lie together.
        pooling: Names of the poolings.

    Returns:
        ``(batch, p, heads, s)``; zeros for a super-block of padding alone.
    """
    batch, blocks = summaries.shape[:2]
    child, real = level.inside()
    place = child.clamp(0, max(blocks - 1, 0)).flatten(1).expand(batch, -1)
    place = place[..., None, None].expand(-1, -1, *summaries.shape[2:])
    tiles = summaries.gather(1, place).unflatten(1, (-1, level.size))
    keep, some = real[..., None, None], real.any(-1)[..., None, None]
    parts = []
    for name, part in zip(pooling, tiles.chunk(len(pooling), -1), strict=True):
        if name in ("max", "min"):
            reduce, worst = (torch.amax, -torch.inf) if name == "max" else (torch.amin, torch.inf)
            parts.append(torch.where(some, reduce(torch.where(keep, part, worst), 2), 0))
        else:
            count = keep.sum(2).clamp(min=1).to(part.dtype)
            parts.append(torch.where(keep, part, 0).sum(2) / count)
    return torch.cat(parts, -1)


def coarse_intervals(intervals: Tensor, owner: Tensor) -> Tensor:
    """:meth:`CandidateRule.intervals` in super-blocks: whatever touches one takes in all of it.

    A super-block that a causal row sees in part holds its diagonal block and so is forced: no
    choice depends on the summary of blocks that the row does not see.

    Args:
        intervals: ``(1 or b, 5, i)`` int32, within one document each.
        owner: ``(1 or b, j)`` int64: the super-block of each block.
    """
    low, end, sink_end, near_first, near_end = intervals.unbind(1)

    def down(x: Tensor) -> Tensor:
        return look_up(owner, x)

    def up(x: Tensor) -> Tensor:
        return down(x - 1) + 1

    near_first = torch.maximum(near_first, low)
    near_end = torch.minimum(near_end, end)
    sink_end = torch.minimum(sink_end, end)
    first = down(low)
    empty = torch.zeros_like(first)
    near = near_end > near_first
    return torch.stack(
        [
            first,
            torch.where(end > low, up(end), first),
            torch.where(sink_end > low, up(sink_end), first),
            torch.where(near, down(near_first), empty),
            torch.where(near, up(near_end), empty),
        ],
        1,
    ).int()


def children(counts: Tensor, indices: Tensor, level: SuperBlocks) -> Tensor:
    """What lies inside the chosen super-blocks.

    Args:
        counts: ``(b, h, i)``: chosen super-blocks per row.
        indices: ``(b, h, i, k)``: their numbers, ascending.
        level: Theirs.

    Returns:
        The numbers of what they hold, int32 ``(b, h, i, k * size)``; -1 where there is none. Place
        ``slot * size + r`` holds number r of the super-block in that slot.
    """
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    step = torch.arange(level.size, device=indices.device)
    child = look_up(level.first, indices)[..., None] + step
    there = used[..., None] & (step < look_up(level.count, indices)[..., None])
    return torch.where(there, child, -1).flatten(-2).int()


def parent_slots(counts: Tensor, indices: Tensor, parent: Tensor) -> Tensor:
    """The slot of given super-blocks in the chosen list, int64 shaped like ``parent``."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # Ascending to the end, as the search needs.
    filled = torch.where(used, indices, torch.iinfo(torch.int32).max).contiguous()
    return torch.searchsorted(filled, parent.int().contiguous()).clamp(max=indices.shape[-1] - 1)


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
