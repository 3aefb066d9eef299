"""Fixed patterns: rankings of key blocks that do not look at the content.

A fixed pattern is a ranking and nothing else: the same candidates, budget and top-k turn it into
a BlockPattern, so fixed and adaptive attention at one sparsity differ in who ranked the blocks.
Rankings see the distance ``δ = own block - key block`` (its absolute value where blocks after
the own one are visible). Higher is chosen first; forced blocks come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Larger than any distance in blocks, and small enough that float32 tells neighbours apart.
_FAR = float(2**20)


@dataclass(frozen=True, eq=False)
class TileGrid:
    """Where the candidates of a layer lie. All broadcast to ``(batch, heads, i, c)``.

    Attributes:
        distance: ``own block - key block``, negative after the own block.
        position: Key block number counted from the start of the sequence or document.
        head: Head number.
        row: Query block number.
    """

    distance: Tensor
    position: Tensor
    head: Tensor
    row: Tensor


def local_window(grid: TileGrid) -> Tensor:
    """Nearest blocks first: a sliding window (Longformer, arXiv 2004.05150).

    ::

        x . . . . .
        x x . . . .
        . x x . . .
        . . x x . .
    """
    return -grid.distance.abs().float()


def dilated(grid: TileGrid) -> Tensor:
    """Blocks ``≡ head (mod 2^(head mod 3))`` first, nearest first (LongNet, arXiv 2307.02486).

    Each head reads every first, second or fourth block of its segment, shifted per head.
    """
    rate = 2 ** (grid.head % 3)
    on_lattice = grid.position % rate == grid.head % rate
    return _first(on_lattice, grid)


def strided(grid: TileGrid) -> Tensor:
    """Distances that are multiples of a stride first (Sparse Transformer, arXiv 1904.10509).

    The stride is 1, 4, 2 or 8 blocks, by head.
    """
    # Powers by the head's last two bits, as a table of strides would wait for the device.
    low, high = grid.head % 2, grid.head // 2 % 2
    stride = 2 ** (2 * low + high)
    return _first(grid.distance % stride == 0, grid)


def hierarchical(grid: TileGrid) -> Tensor:
    """Distances 1, 2, 4, 8, … first: fine near, coarse far (LogSparse, arXiv 1907.00235)."""
    distance = grid.distance.abs()
    power = (distance > 0) & ((distance & (distance - 1)) == 0)
    return _first(power, grid)


def sink_local(grid: TileGrid) -> Tensor:
    """The first block, then the nearest (StreamingLLM, arXiv 2309.17453)."""
    return torch.where(grid.position == 0, _FAR, -grid.distance.abs().float())


def random(grid: TileGrid) -> Tensor:
    """A fixed pseudo-random order per head and row, the same on every run and device."""
    # An integer hash (the constants are those of a common 32-bit mixer).
    x = (grid.row * 73856093) ^ (grid.position * 19349663) ^ ((grid.head + 1) * 83492791)
    for factor in (0x45D9F3B, 0x45D9F3B):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x & 0xFFFFFF).float() / 2**24


def _first(chosen: Tensor, grid: TileGrid) -> Tensor:
    """Nearest first, the chosen ones before all others."""
    near = -grid.distance.abs().float()
    return torch.where(chosen, near, near - _FAR)


Ranking = Callable[[TileGrid], Tensor]

FIXED_PATTERNS: dict[str, Ranking | None] = {
    "local": local_window,
    "dilated": dilated,
    "strided": strided,
    "hierarchical": hierarchical,
    "sink_local": sink_local,
    "random": random,
    # Every visible block, whatever the budget.
    "dense": None,
}
