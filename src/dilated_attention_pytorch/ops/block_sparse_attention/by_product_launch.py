"""Launches the Triton kernels of tile mass and bias gradient, and holds their workspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention import triton_by_products as kernels
from dilated_attention_pytorch.ops.block_sparse_attention.launch_config import (
    LaunchConfig,
    mass_config,
)
from dilated_attention_pytorch.ops.block_sparse_attention.triton_call import Call, source
from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import LOG2E
from dilated_attention_pytorch.ops.triton_device import on_device, strides


def parts_of(config: LaunchConfig, pack: int) -> int:
    """Parts in which a program stores the sum over a tile of ``pack`` heads."""
    # Elsewhere warps divide the columns, so that none has the sum of its rows.
    own_rows = config.num_warps % 4 == 0 and pack * config.rows == 16 * config.num_warps
    return config.num_warps if own_rows else 1


@dataclass(frozen=True, eq=False)
class Parts:
    """Where kernels leave what they add up of each tile: one plane per visit, some parts in each.

    Entries past a row's count stay unwritten.

    Attributes:
        config: Launch of the kernel that writes them.
        block_bias: ``(b, planes, i, k, parts)`` float32 or None.
        mass: Likewise.
    """

    config: LaunchConfig
    block_bias: Tensor | None
    mass: Tensor | None

    @classmethod
    def make(
        cls, call: Call, config: LaunchConfig, pack: int, want_bias: bool, want_mass: bool
    ) -> Parts:
        """Allocates what is wanted for programs of ``pack`` heads."""
        visits = (call.block_q // config.rows) * (call.block_k // config.columns)
        batch, _, num_heads, _ = call.query.shape
        shape = (batch, num_heads // pack * visits, *call.indices.shape[2:], parts_of(config, pack))
        bias, mass = (
            call.query.new_empty(shape, dtype=torch.float32) if wanted else None
            for wanted in (want_bias, want_mass)
        )
        return cls(config, bias, mass)

    def collect(
        self, call: Call, norm: Tensor, block_bias: Tensor | None, mass: Tensor | None
    ) -> None:
        """Adds up the parts, and divides the mass by the rows' gradient norms ``(b, h, rows)``."""
        if block_bias is not None and self.block_bias is not None:
            self._collect(call, self.block_bias, norm, block_bias, share=False)
        if mass is not None and self.mass is not None:
            self._collect(call, self.mass, norm, mass, share=True)

    def _collect(
        self, call: Call, parts: Tensor, norm: Tensor, target: Tensor, *, share: bool
    ) -> None:
        batch, heads, blocks, width = call.indices.shape
        if target.numel() == 0:
            return
        with on_device(norm.device):
            kernels.collect_kernel[(blocks, batch * heads)](
                parts, norm, target, call.counts, *call.counts.stride(),
                heads, norm.shape[1], blocks, width, parts.shape[1] // heads,
                call.query.shape[1], norm.shape[2],
                HEADS_PER_PATTERN=call.heads_per_pattern, BLOCK_Q=call.block_q,
                ROWS=self.config.rows, COLUMN_VISITS=call.block_k // self.config.columns,
                PARTS=parts.shape[4], SLOTS=min(max(triton.next_power_of_2(width), 16), 64),
                SHARE=share, num_warps=1,
            )  # fmt: skip


def launch_mass(call: Call, lse: Tensor, grad_out: Tensor, mass: Tensor) -> None:
    """Writes the tile mass alone, one product per tile.

    Args:
        call: As in the forward pass: whole blocks, no mask but a causal one of equal lengths.
        lse: Its lse, contiguous.
        grad_out: Gradient of the output; last dimension contiguous.
        mass: ``(b, p, i, k)`` float32, contiguous.
    """
    batch, q_len, num_heads, _ = call.query.shape
    if mass.numel() == 0:
        return
    config = mass_config(call.tile())
    tiles = q_len // config.rows
    parts = Parts.make(call, config, 1, False, True)
    norm = lse.new_empty(batch, num_heads, q_len)
    query, tma_q = source(call.query, 1, config.rows, call)
    gradient, tma_g = source(grad_out, 1, config.rows, call)
    key, tma = source(call.key, 1, config.columns, call)
    tma_q = tma_q and tma_g
    constants = call.constants()
    with on_device(call.query.device):
        kernels.mass_kernel[(tiles, num_heads, batch)](
            query if tma_q else call.query, *strides(call.query),
            key if tma else call.key, *strides(call.key),
            gradient if tma_q else grad_out, *strides(grad_out),
            lse, norm, parts.mass,
            call.counts, *call.counts.stride(), call.indices, *call.indices.stride()[:3],
            q_len, call.key.shape[1], call.scale * LOG2E.value, num_heads, tiles,
            *call.indices.shape[2:],
            **{name: constants[name] for name in (
                "GROUP", "HEADS_PER_PATTERN", "D", "HEAD_DIM", "CAUSAL", "UPCAST", "PRECISION",
            )},
            BLOCK=call.block_q, ROWS=config.rows, COLUMNS=config.columns,
            PARTS=parts_of(config, 1), TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
            **config.options(),
        )  # fmt: skip
    parts.collect(call, norm, None, mass)
