"""Launches the kernels that say how many blocks each row may read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import (
    batch_stride,
    overlap,
    plane_strides,
)
from dilated_attention_pytorch.ops.triton_device import on_device

# Chunks of columns that the unit means are added up in, and columns that are read at a time.
_CHUNKS, _PART = 16, 32


@dataclass(frozen=True, eq=False)
class BudgetInputs:
    """What a row's budget depends on, besides the level's tables.

    Attributes:
        means: ``(b, g, j, d)`` block means, or None for a budget that ignores content.
        gain: ``(p,)`` or None.
        offset: ``(p,)`` or None.
        base_sparsity: 0-dim float32.
        rule: ``(1 or b, 5, i)`` int32.
        diagonal: ``(1 or b, i)`` int64.
        document: ``(1 or b, i)`` int64.
        forced: ``(1 or b, 1 or p, i)``.
        limit: The same.
        filled: ``(1 or b, 1 or p, documents, width + 2)`` float32.
        rising: ``(1 or b, 1 or p, documents, width + 1)`` float32.
        visible: ``(1 or b, documents)`` float32.
        has_diagonal: Whether rows have a block of their own among the columns.
        max_factor: Bound of the content's factor.
    """

    means: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    base_sparsity: Tensor
    rule: Tensor
    diagonal: Tensor
    document: Tensor
    forced: Tensor
    limit: Tensor
    filled: Tensor
    rising: Tensor
    visible: Tensor
    has_diagonal: bool
    max_factor: float


def launch_budget(call: BudgetInputs, exact: Tensor, slope: Tensor, complexity: Tensor) -> None:
    """Writes real-valued budgets ``(b, p, i)`` and what their gradient needs."""
    batch, heads, rows = exact.shape
    if exact.numel() == 0:
        return
    device, means = exact.device, call.means
    columns, kv_heads, head_dim = 1, 1, 1
    prefix = totals = exact
    if means is not None:
        _, kv_heads, columns, head_dim = means.shape
        prefix = torch.empty(batch, kv_heads, columns, head_dim, device=device)
        totals = torch.empty(batch, kv_heads, _CHUNKS, head_dim, device=device)
    steps = triton.cdiv(columns, _CHUNKS * _PART)
    sizes = {
        "PART": _PART, "CHUNKS": _CHUNKS, "D": triton.next_power_of_2(head_dim),
        "HEAD_DIM": head_dim, "num_warps": 4,
    }  # fmt: skip
    width = call.rising.shape[-1] - 1
    with on_device(device):
        if means is not None:
            kernels.prefix_kernel[(triton.cdiv(columns, steps * _PART), batch * kv_heads)](
                means,
                *means.stride()[:3],
                prefix,
                totals,
                columns,
                steps,
                kv_heads,
                **sizes,
                **overlap(device),
            )
        kernels.budget_kernel[(triton.cdiv(rows, 16), batch * heads)](
            *((exact, 0, 0, 0) if means is None else (means, *means.stride()[:3])), prefix, totals,
            call.rule, batch_stride(call.rule), call.diagonal, batch_stride(call.diagonal),
            call.document, batch_stride(call.document), call.forced, *plane_strides(call.forced),
            call.limit, *plane_strides(call.limit), call.filled, *plane_strides(call.filled),
            call.rising, *plane_strides(call.rising), call.visible, batch_stride(call.visible),
            exact if call.gain is None else call.gain,
            exact if call.offset is None else call.offset,
            call.base_sparsity, exact, slope, complexity,
            rows, columns, steps, heads, kv_heads, width, ROWS=16, **sizes,
            STEPS=(width + 2).bit_length(), ADAPTIVE=means is not None,
            DIAGONAL=call.has_diagonal, MAX_FACTOR=call.max_factor,
            PER_HEAD=kv_heads if heads == 1 else 1, **overlap(device),
        )  # fmt: skip


def launch_round(exact: Tensor, rounded: Tensor, bits: int) -> None:
    """Writes integer budgets ``(b, p, i)`` in units of ``2**-bits``; one document."""
    batch, heads, rows = exact.shape
    if exact.numel() == 0:
        return
    chunk = min(triton.next_power_of_2(rows), 2048)
    with on_device(exact.device):
        kernels.round_kernel[(batch * heads,)](
            exact, rounded, rows, BITS=bits, CHUNK=chunk, num_warps=4, **overlap(exact.device)
        )
