"""The transpose of lists as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE
from dilated_attention_pytorch.ops.block_selection.triton_launch import transpose as launch


@torch.library.custom_op(f"{NAMESPACE}::transpose_lists", mutates_args=())
def transpose_op(counts: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Offsets ``(b, h, j + 1)`` and slots ``(b, h, i * k)`` of packed ascending lists."""
    offsets, slots = _empty_transpose(indices, columns)
    launch.launch_transpose(counts.contiguous(), indices.contiguous(), offsets, slots)
    return offsets, slots


def _empty_transpose(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    b, h, i, k = indices.shape
    return indices.new_empty(b, h, columns + 1), indices.new_empty(b, h, i * k)


@transpose_op.register_fake
def _(counts: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    return _empty_transpose(indices, columns)
