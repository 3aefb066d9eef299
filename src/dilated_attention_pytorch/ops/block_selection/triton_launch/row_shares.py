"""What the launches of both kinds of budgets share: the rows' shares by their content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import (
    batch_stride,
    overlap,
)
from dilated_attention_pytorch.selection.budget import LEAST_FACTOR, MOST_FACTOR

# Chunks of columns that the unit means are added up in, and columns that are read at a time.
_CHUNKS, _PART = 16, 32


@dataclass(frozen=True, eq=False)
class ShareInputs:
    """What the share of a row depends on.

    Attributes:
        means: ``(b, g, j, d)`` block means, or None for a budget that ignores content.
        gain: ``(p,)`` or None.
        offset: ``(p,)`` or None.
        base_sparsity: 0-dim float32.
        rule: ``(1 or b, 5, i)`` int32.
        diagonal: ``(1 or b, i)`` int64.
        has_diagonal: Whether rows have a block of their own among the columns.
    """

    means: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    base_sparsity: Tensor
    rule: Tensor
    diagonal: Tensor
    has_diagonal: bool


@dataclass(frozen=True, eq=False)
class ShareArguments:
    """Arguments of ``row_share``, in the order in which the kernels take them.

    Attributes:
        content: From the means to the diagonal.
        learned: Gain, offset and base sparsity.
        counts: Columns, steps, heads, kv heads.
        constants: The compile-time ones.
    """

    content: tuple[Any, ...]
    learned: tuple[Tensor, Tensor, Tensor]
    counts: tuple[int, int, int, int]
    constants: dict[str, Any]


def launch_prefix(call: ShareInputs, exact: Tensor) -> ShareArguments:
    """Adds up the unit means, on the current device, for budgets ``exact`` (b, p, i)."""
    batch, heads, _ = exact.shape
    device, means = exact.device, call.means
    columns, kv_heads, head_dim = 1, 1, 1
    prefix = totals = exact
    if means is not None:
        _, kv_heads, columns, head_dim = means.shape
        prefix = means.new_empty(batch, kv_heads, columns, head_dim, dtype=torch.float32)
        totals = prefix.new_empty(batch, kv_heads, _CHUNKS, head_dim)
    steps = triton.cdiv(columns, _CHUNKS * _PART)
    sizes = {
        "PART": _PART, "CHUNKS": _CHUNKS, "D": triton.next_power_of_2(head_dim),
        "HEAD_DIM": head_dim, "num_warps": 4,
    }  # fmt: skip
    source: tuple[Any, ...] = (exact, 0, 0, 0)
    if means is not None:
        source = (means, *means.stride()[:3])
        kernels.prefix_kernel[(triton.cdiv(columns, steps * _PART), batch * kv_heads)](
            *source, prefix, totals, columns, steps, kv_heads, **sizes, **overlap(device)
        )
    return ShareArguments(
        (
            *source, prefix, totals, call.rule, batch_stride(call.rule),
            call.diagonal, batch_stride(call.diagonal),
        ),
        (
            exact if call.gain is None else call.gain,
            exact if call.offset is None else call.offset,
            call.base_sparsity,
        ),
        (columns, steps, heads, kv_heads),
        {
            **sizes, "ADAPTIVE": means is not None, "DIAGONAL": call.has_diagonal,
            "MIN_FACTOR": LEAST_FACTOR, "MAX_FACTOR": MOST_FACTOR,
            "PER_HEAD": kv_heads if heads == 1 else 1,
        },
    )  # fmt: skip
