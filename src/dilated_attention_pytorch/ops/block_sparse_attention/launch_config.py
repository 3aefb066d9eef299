"""How the Triton kernels are launched, as measured (``benchmarks/results/tune_triton.json``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import INTERPRETED


@dataclass(frozen=True)
class TileShape:
    """What a launch depends on.

    Attributes:
        block_q: Tokens per query block.
        block_k: Tokens per key block.
        head_dim: The power of two that a tile's last dimension takes.
        full_precision: Whether inputs are float32.
    """

    block_q: int
    block_k: int
    head_dim: int
    full_precision: bool


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        rows: Query tokens of each packed head in a tile.
        columns: Key tokens in a tile.
        num_warps: Warps of a program.
        num_stages: Tiles in flight from memory.
        maxnreg: Registers of a thread, so that more programs share a multiprocessor. None: free.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """Triton's launch options."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Triton's interpreter does not know this option.
        if self.maxnreg is not None and not INTERPRETED:
            found["maxnreg"] = self.maxnreg
        return found


def forward_config(tile: TileShape) -> LaunchConfig:
    """The launch (`benchmarks/results/tune_triton.json`) of the forward kernel."""
    d = tile.head_dim
    if tile.full_precision:
        return LaunchConfig(min(tile.block_q, 64), min(tile.block_k, 32), 4, 1)
    rows, columns = min(tile.block_q, 64), min(tile.block_k, 64)
    return LaunchConfig(rows, columns, 4, 3 if 64 < d <= 128 else 2)


def query_config(tile: TileShape) -> LaunchConfig:
    """The launch (`benchmarks/results/tune_triton.json`) of the dQ kernel."""
    d = tile.head_dim
    if tile.full_precision:
        return LaunchConfig(min(tile.block_q, 32), min(tile.block_k, 32), 4, 1)
    rows, columns = min(tile.block_q, 64), min(tile.block_k, 64 if d <= 128 else 32)
    return LaunchConfig(rows, columns, 8 if d > 128 else 4, 2, 128 if d <= 64 else None)


def key_config(tile: TileShape) -> LaunchConfig:
    """The launch (`benchmarks/results/tune_triton.json`) of the dK, dV kernel."""
    d = tile.head_dim
    if tile.full_precision:
        return LaunchConfig(min(tile.block_q, 32), min(tile.block_k, 32), 4, 1)
    rows = min(tile.block_q, 64 if d <= 128 else 32)
    columns = min(tile.block_k, 64)
    if d <= 64:
        return LaunchConfig(rows, columns, 4, 3, 168)
    return LaunchConfig(rows, columns, 8 if d > 128 else 4, 2 if d <= 128 else 1)


def mass_config(tile: TileShape) -> LaunchConfig:
    """The launch (`docs/log.md`) of the mass alone: it waits for keys, so it takes large tiles."""
    if tile.full_precision:
        return query_config(tile)
    rows, columns = min(tile.block_q, 128 if tile.head_dim > 64 else 64), min(tile.block_k, 128)
    return LaunchConfig(rows, columns, 8 if rows == 128 else 4, 2)
