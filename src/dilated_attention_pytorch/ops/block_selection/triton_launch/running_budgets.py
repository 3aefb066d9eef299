"""Launches the kernels of budgets that depend on nothing later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.row_shares import (
    ShareInputs,
    launch_prefix,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import (
    batch_stride,
    overlap,
    plane_strides,
)
from dilated_attention_pytorch.ops.triton_device import on_device

# Rows that a program adds up at a time.
MAX_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class RunningInputs:
    """What a row's running budget depends on.

    Attributes:
        share: What its share depends on.
        document: ``(1 or b, i)`` int64, ascending.
        forced: ``(1 or b, 1 or p, i)``.
        limit: The same.
        even: 0-dim float32, or None: so much of what lies above the forced blocks.
        bits: Shares are counted in units of ``2**-bits`` blocks.
    """

    share: ShareInputs
    document: Tensor
    forced: Tensor
    limit: Tensor
    even: Tensor | None
    bits: int


def launch_running(
    call: RunningInputs, exact: Tensor, slope: Tensor, complexity: Tensor, budget: Tensor
) -> None:
    """Writes real-valued budgets ``(b, p, i)``, what their gradient needs, and integer ones."""
    batch, heads, rows = exact.shape
    if exact.numel() == 0:
        return
    device = exact.device
    units = torch.empty(exact.shape, dtype=torch.int64, device=device)
    bounds = (
        call.forced, *plane_strides(call.forced), call.limit, *plane_strides(call.limit),
    )  # fmt: skip
    with on_device(device):
        share = launch_prefix(call.share, exact)
        kernels.share_kernel[(triton.cdiv(rows, 16), batch * heads)](
            *share.content, *bounds, *share.learned, exact if call.even is None else call.even,
            exact, slope, complexity, units, rows, *share.counts, ROWS=16, BITS=call.bits,
            LOWER=call.even is not None, **share.constants,
            enable_fp_fusion=False, **overlap(device),
        )  # fmt: skip
        kernels.running_kernel[(batch * heads,)](
            units, *bounds, call.document, batch_stride(call.document), budget, rows, heads,
            BITS=call.bits, CHUNK=min(max(triton.next_power_of_2(rows), 32), MAX_CHUNK),
            num_warps=4,
            **overlap(device),
        )  # fmt: skip
