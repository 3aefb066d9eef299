"""Launches the kernels of the water level's budgets."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class BudgetInputs:
    """What a row's budget depends on.

    Attributes:
        share: What its share depends on.
        document: ``(1 or b, i)`` int64.
        forced: ``(1 or b, 1 or p, i)``.
        limit: The same.
        filled: ``(1 or b, 1 or p, documents, width + 2)`` float32.
        rising: ``(1 or b, 1 or p, documents, width + 1)`` float32.
        visible: ``(1 or b, documents)`` float32.
    """

    share: ShareInputs
    document: Tensor
    forced: Tensor
    limit: Tensor
    filled: Tensor
    rising: Tensor
    visible: Tensor


def launch_budget(call: BudgetInputs, exact: Tensor, slope: Tensor, complexity: Tensor) -> None:
    """Writes real-valued budgets ``(b, p, i)`` and what their gradient needs."""
    batch, heads, rows = exact.shape
    if exact.numel() == 0:
        return
    width = call.rising.shape[-1] - 1
    with on_device(exact.device):
        share = launch_prefix(call.share, exact)
        kernels.budget_kernel[(triton.cdiv(rows, 16), batch * heads)](
            *share.content, call.document, batch_stride(call.document),
            call.forced, *plane_strides(call.forced), call.limit, *plane_strides(call.limit),
            call.filled, *plane_strides(call.filled), call.rising, *plane_strides(call.rising),
            call.visible, batch_stride(call.visible), *share.learned, exact, slope, complexity,
            rows, *share.counts, width, ROWS=16, STEPS=(width + 2).bit_length(),
            **share.constants, **overlap(exact.device),
        )  # fmt: skip


def launch_round(exact: Tensor, rounded: Tensor, bits: int) -> None:
    """Writes integer budgets ``(b, p, i)`` in units of ``2**-bits``; one document."""
    batch, heads, rows = exact.shape
    if exact.numel() == 0:
        return
    chunk = min(triton.next_power_of_2(rows), 2048)
    with on_device(exact.device):
        kernels.round_kernel[(batch * heads,)](
            exact,
            rounded,
            rows,
            heads,
            BITS=bits,
            CHUNK=chunk,
            num_warps=4,
            **overlap(exact.device),
        )
