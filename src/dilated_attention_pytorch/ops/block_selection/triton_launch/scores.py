"""Launches the kernels that score the candidates."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import (
    overlap,
    plane_strides,
)
from dilated_attention_pytorch.ops.triton_device import on_device

# Slots or tiles of one row that a program reads at a time.
_TILE = 64


def launch_towers(
    queries: Tensor,
    keys: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gain: Tensor,
    factor: float,
    outs: tuple[Tensor, Tensor],
) -> None:
    """Writes ``(b, h / share, i or j, share * r)``: first maps of both sides' summaries.

    Args:
        queries: ``(b, g, i, s)``, last dimension contiguous.
        keys: ``(b, g', j, s)``, likewise.
        query_weight: ``(h, s, r)`` contiguous.
        key_weight: The same.
        gain: ``(1,)``, factor of the queries' maps.
        factor: Another one.
        outs: Contiguous float32.
    """
    heads, size, rank = query_weight.shape
    batch, rows, num_keys = queries.shape[0], queries.shape[2], keys.shape[2]
    tile = 64
    tiles = triton.cdiv(rows, tile) + triton.cdiv(num_keys, tile)
    if tiles == 0 or batch == 0:
        return
    with on_device(queries.device):
        kernels.tower_kernel[(tiles, batch * heads)](
            queries, *queries.stride()[:3], keys, *keys.stride()[:3],
            query_weight, key_weight, gain, *outs, rows, num_keys, heads,
            heads // queries.shape[1], heads // keys.shape[1], heads // outs[0].shape[1], factor,
            ROWS=tile, S=triton.next_power_of_2(size), SIZE=size,
            PART=min(max(triton.next_power_of_2(size), 16), 64),
            R=max(triton.next_power_of_2(rank), 16), RANK=rank, num_warps=4,
            **overlap(queries.device),
        )  # fmt: skip


def launch_products(query: Tensor, key: Tensor, scores: Tensor) -> None:
    """Writes ``(b, p, i, j)``: all products of ``query`` (b, p, i, r) and ``key`` (b, p, j, r),
    both contiguous."""
    batch, heads, rows, rank = query.shape
    if scores.numel() == 0:
        return
    keys = key.shape[2]
    part = min(max(triton.next_power_of_2(rank), 16), 32)
    tile = 128
    tiles = triton.cdiv(rows, 64) * triton.cdiv(keys, tile)
    with on_device(query.device):
        kernels.product_kernel[(tiles, batch * heads)](
            query, key, scores, rows, keys, R=triton.cdiv(rank, part) * part, RANK=rank, PART=part,
            ROWS=64, C=tile, EVEN=keys % 16 == 0, num_warps=4, **overlap(query.device),
        )  # fmt: skip


def launch_bilinear(query: Tensor, key: Tensor, candidates: Tensor, scores: Tensor) -> None:
    """Writes ``(b, p, i, c)``: products of ``query`` (b, p, i, r) and the candidates' rows of
    ``key`` (b, p, j, r), both contiguous."""
    batch, heads, rows, rank = query.shape
    if scores.numel() == 0:
        return
    columns = scores.shape[-1]
    part = min(triton.next_power_of_2(rank), 32)
    tiles = triton.cdiv(columns, _TILE)
    with on_device(query.device):
        kernels.bilinear_kernel[(tiles * rows * batch * heads,)](
            query, key, candidates, *plane_strides(candidates), candidates.stride(2), scores,
            rows, columns, key.shape[2], tiles, heads,
            R=triton.cdiv(rank, part) * part, RANK=rank, C=_TILE, PART=part, num_warps=2,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Network:
    """Weights of the MLP scorer, contiguous.

    Attributes:
        bias: ``(layers, h, r)``.
        hidden: ``(layers - 1, h, r, r)``.
        out: ``(h, r)``.
        gain: ``(1,)``.
    """

    bias: Tensor
    hidden: Tensor
    out: Tensor
    gain: Tensor


def launch_mlp(
    query: Tensor, key: Tensor, candidates: Tensor | None, network: Network, scores: Tensor
) -> None:
    """Writes ``(b, p, i, c)``: the MLP's scores from its first maps ``(b, h, i or j, r)``."""
    batch, heads, rows, rank = query.shape
    if scores.numel() == 0:
        return
    pattern_heads, columns = scores.shape[1], scores.shape[3]
    tile = 64 if rank <= 64 else 32
    tiles = triton.cdiv(columns, tile)
    listed = candidates is not None
    lists = (0, 0, 0) if candidates is None else (*plane_strides(candidates), candidates.stride(2))
    with on_device(query.device):
        kernels.mlp_kernel[(tiles * rows * batch * pattern_heads,)](
            query, key, candidates if listed else query, *lists,
            network.bias, network.hidden, network.out, network.gain, scores,
            rows, columns, key.shape[2], tiles, pattern_heads, heads,
            R=max(triton.next_power_of_2(rank), 16), RANK=rank, C=tile,
            LAYERS=network.bias.shape[0], SHARE=heads // pattern_heads, LISTS=listed, num_warps=4,
        )  # fmt: skip
