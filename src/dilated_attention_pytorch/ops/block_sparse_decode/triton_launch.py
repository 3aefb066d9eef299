"""Launches the decode kernels: layouts, splits, the workspace of the partial results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_decode import triton_kernels as kernels
from dilated_attention_pytorch.ops.triton_device import on_device, strides

# Programs per multiprocessor that the split aims at.
_WAVES = 2
_MOST_SPLITS = 64


@dataclass(frozen=True)
class LaunchConfig:
    """How the split kernel is launched.

    Attributes:
        columns: Key tokens of a tile.
        num_warps: Warps of a program.
        num_stages: Tiles in flight from memory.
        splits: Programs that share a list; None: enough to fill the device.
    """

    columns: int
    num_warps: int
    num_stages: int
    splits: int | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One decode step.

    Attributes:
        query: ``(b, n, h, d)``, like ``key`` and ``value`` with any strides but 1 for ``d``.
        key: ``(b, m, g, d)``.
        value: ``(b, m, g, d)``.
        counts: ``(b, p, n)`` int32.
        indices: ``(b, p, n, k)`` int32, last dimension contiguous.
        block_bias: ``(b, p, n, k)`` float32, last dimension contiguous, or None.
        lengths: ``(b,)``.
        starts: ``(b,)`` or None.
        block_size: Tokens per block.
        scale: Factor of the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    counts: Tensor
    indices: Tensor
    block_bias: Tensor | None
    lengths: Tensor
    starts: Tensor | None
    block_size: int
    scale: float

    @property
    def pack(self) -> int:
        """Query heads that share keys and list: all of them are rows of one tile."""
        heads = self.query.shape[2]
        return min(heads // self.key.shape[2], heads // self.counts.shape[1])

    @property
    def padded_head_dim(self) -> int:
        """The power of two that a tile's last dimension takes."""
        return max(16, triton.next_power_of_2(self.query.shape[3]))


def launch_config(call: Call) -> LaunchConfig:
    """The launch of the split kernel, from shapes alone."""
    d = call.padded_head_dim
    if call.query.dtype == torch.float32:
        return LaunchConfig(32 if d <= 128 else 16, 4, 2)
    return LaunchConfig(64 if d <= 128 else 32, 4, 3)


def launch_decode(call: Call, out: Tensor, lse: Tensor, config: LaunchConfig | None = None) -> None:
    """Writes the output ``(b, n, h, d)`` and the lse ``(b, h, n)``, both preallocated."""
    if 0 in (out.numel(), call.key.numel(), call.indices.numel()):
        out.zero_()
        lse.fill_(-torch.inf)
        return
    config = config or launch_config(call)
    batch, new, heads, dim = call.query.shape
    packs = heads // call.pack
    splits = config.splits or _num_splits(call, packs * batch * new, config.columns)
    partial = call.query.new_empty(batch, heads, new, splits, dim, dtype=torch.float32)
    partial_lse = call.query.new_empty(batch, heads, new, splits, dtype=torch.float32)
    bias = call.block_bias
    full_precision = torch.get_float32_matmul_precision() == "highest"
    with on_device(call.query.device):
        kernels.split_kernel[(splits, packs, batch * new)](
            call.query, *strides(call.query), call.key, *strides(call.key),
            call.value, *strides(call.value), partial, partial_lse,
            call.counts, *call.counts.stride(), call.indices, *call.indices.stride()[:3],
            *((call.counts, 0, 0, 0) if bias is None else (bias, *bias.stride()[:3])),
            call.lengths, call.lengths if call.starts is None else call.starts,
            new, call.key.shape[1], call.indices.shape[3], heads,
            call.scale * kernels.LOG2E.value, splits,
            GROUP=heads // call.key.shape[2], HEADS_PER_LIST=heads // call.counts.shape[1],
            PACK=call.pack, ROWS=max(16, triton.next_power_of_2(call.pack)),
            BLOCK=call.block_size, COLUMNS=config.columns,
            D=call.padded_head_dim, HEAD_DIM=dim, BIAS=bias is not None,
            STARTS=call.starts is not None, UPCAST=kernels.INTERPRETED,
            PRECISION="ieee" if full_precision else "tf32", STAGES=config.num_stages,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        kernels.merge_kernel[(new, heads, batch)](
            partial, partial_lse, out, *strides(out), lse, new, heads, splits,
            SPLITS=triton.next_power_of_2(splits), D=call.padded_head_dim, HEAD_DIM=dim,
            num_warps=4,
        )  # fmt: skip


def _num_splits(call: Call, programs: int, columns: int) -> int:
    """Splits that fill the device, none without a tile when lists are full."""
    tiles = triton.cdiv(call.indices.shape[-1] * call.block_size, columns)
    wanted = triton.cdiv(_WAVES * _multiprocessors(call.query.device), max(programs, 1))
    return max(1, min(wanted, tiles, _MOST_SPLITS))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
