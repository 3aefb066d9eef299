"""Launches the kernels of the low-rank tile mass: tiles, chunks of rows, workspace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import (
    batch_stride,
    overlap,
)
from dilated_attention_pytorch.ops.triton_device import on_device, strides

# Block sums of one chunk of rows: 2**25 float32 numbers are 128 MiB.
_WORKSPACE = 1 << 25
# Key tokens per program: long enough to pay for its queries, short enough to share out evenly.
_KEYS = 1024


@dataclass(frozen=True, eq=False)
class LowRankInputs:
    """What low-rank scores depend on.

    Attributes:
        query: ``(b, n, h, d)``, last dimension contiguous.
        key: ``(b, m, g, d)``, likewise.
        query_map: ``(h, d, r)`` contiguous.
        key_map: The same.
        spans: ``(1 or b, 2, t)`` int32 contiguous: first key and end of every sampled query.
        query_stride: Take every so many queries.
        block_size: Tokens per block, a multiple of it.
        scale: Factor of the logits.
    """

    query: Tensor
    key: Tensor
    query_map: Tensor
    key_map: Tensor
    spans: Tensor
    query_stride: int
    block_size: int
    scale: float


def launch_low_rank(call: LowRankInputs, scores: Tensor) -> None:
    """Writes ``(b, pattern heads, i, j)``: the logarithm of the mean mass."""
    batch, _, heads, head_dim = call.query.shape
    pattern_heads, blocks, columns = scores.shape[1:]
    if scores.numel() == 0:
        return
    total_rows, planes, device = call.spans.shape[2], batch * heads, call.query.device
    d, rank = max(triton.next_power_of_2(head_dim), 16), call.query_map.shape[2]
    # bfloat16 keys need no rounding, and queries lose what they lost when they were made.
    wide = call.query.dtype != torch.bfloat16
    folded = torch.empty(
        planes, total_rows, head_dim, device=device,
        dtype=torch.float32 if wide else torch.bfloat16,
    )  # fmt: skip
    tile = _tile(call.block_size, d, wide)
    per_block = call.block_size // call.query_stride
    chunk_blocks = max(_WORKSPACE // (planes * columns * per_block), 1)
    sums = folded.new_empty(
        planes * columns * min(chunk_blocks * per_block, total_rows), dtype=torch.float32
    )
    wide_chunk = max(_KEYS // call.block_size, 1)
    key_chunks = ceil_div(columns, wide_chunk)
    with on_device(device):
        kernels.fold_kernel[(ceil_div(total_rows, 64), planes)](
            call.query, *strides(call.query), call.query_map, call.key_map, folded, total_rows,
            heads, call.scale / math.log(2), STRIDE=call.query_stride, ROWS=64, D=d,
            HEAD_DIM=head_dim, R=max(triton.next_power_of_2(rank), 16), RANK=rank,
            num_warps=4, **overlap(device),
        )  # fmt: skip
        for first in range(0, blocks, chunk_blocks):
            first_row = first * per_block
            num_rows = min(chunk_blocks * per_block, total_rows - first_row)
            kernels.block_sum_kernel[(key_chunks * ceil_div(num_rows, tile.rows), planes)](
                folded, call.key, *strides(call.key), call.spans, batch_stride(call.spans), sums,
                first_row, num_rows, total_rows, call.key.shape[1], columns, key_chunks, heads,
                heads // call.key.shape[2], BLOCK=call.block_size, N=tile.columns,
                CHUNK=wide_chunk, ROWS=tile.rows, D=d, HEAD_DIM=head_dim,
                EVEN=tile.columns == call.block_size, WIDE=wide, UPCAST=kernels.INTERPRETED,
                num_warps=tile.warps, num_stages=tile.stages, **overlap(device),
            )  # fmt: skip
            kernels.mass_kernel[(ceil_div(num_rows, per_block), batch * pattern_heads)](
                sums, call.spans, batch_stride(call.spans), scores, first_row, num_rows, total_rows,
                columns, heads, BLOCK=call.block_size, PER_BLOCK=per_block,
                P=triton.next_power_of_2(per_block), C=max(2048 // per_block, 16),
                SHARE=heads // pattern_heads, num_warps=4, **overlap(device),
            )  # fmt: skip


@dataclass(frozen=True)
class _Tile:
    """Rows and keys of a tile of logits, and how they are computed."""

    rows: int
    columns: int
    warps: int
    stages: int


def _tile(block_size: int, head_dim: int, wide: bool) -> _Tile:
    columns = max(triton.next_power_of_2(block_size), 16)
    # 64 logits a thread, so that three programs fit on a multiprocessor.
    rows = 128 if columns <= 64 and head_dim <= 128 else 64
    size = columns * head_dim * (4 if wide else 2)
    stages = 3 if size <= 16384 else 2 if size <= 32768 else 1
    return _Tile(rows, columns, 8 if columns > 128 else 4, stages)
