"""Launches the kernel that keeps the blocks that reach a threshold."""

from __future__ import annotations

import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import (
    batch_stride,
    overlap,
    plane_strides,
)
from dilated_attention_pytorch.ops.triton_device import on_device


def launch_threshold(
    scores: Tensor,
    rule: Tensor,
    threshold: float,
    own_thresholds: Tensor | None,
    counts: Tensor,
    indices: Tensor,
) -> None:
    """Writes counts and lists; shapes as in ``threshold_op``, the outputs contiguous."""
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
            rule if own_thresholds is None else own_thresholds,
            *plane_strides(own_thresholds),
            own_thresholds.stride(2) if own_thresholds is not None and own_thresholds.shape[2] > 1
            else 0,
            rows, columns, heads, columns, C=c, W=c, EVEN=columns % 16 == 0,
            OWN=own_thresholds is not None,
            num_warps=min(max(c // 512, 1), 32), **overlap(scores.device),
        )  # fmt: skip
