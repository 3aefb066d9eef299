"""Launches the kernel that keeps the blocks that reach a threshold."""

from __future__ import annotations

import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import (
    batch_stride,
    overlap,
)
from dilated_attention_pytorch.ops.triton_device import on_device


def launch_threshold(
    scores: Tensor, rule: Tensor, threshold: float, counts: Tensor, indices: Tensor
) -> None:
    """Writes counts and lists; shapes as in ``threshold_op``, all contiguous but scores."""
    batch, heads, rows, columns = scores.shape
    if counts.numel() == 0:
        return
    if columns == 0:
        counts.zero_()
        return
    c = max(triton.next_power_of_2(columns), 32)
    with on_device(scores.device):
        kernels.threshold_kernel[(rows * batch * heads,)](
            scores, *scores.stride()[:3], rule, batch_stride(rule), counts, indices, threshold,
            rows, columns, heads, columns, C=c, W=c, EVEN=columns % 16 == 0,
            num_warps=min(max(c // 512, 1), 32), **overlap(scores.device),
        )  # fmt: skip
