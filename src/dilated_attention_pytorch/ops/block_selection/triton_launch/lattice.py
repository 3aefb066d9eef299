"""Launches the kernel that lists the candidates of segments."""

from __future__ import annotations

import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import batch_stride
from dilated_attention_pytorch.ops.triton_device import on_device


def launch_lattice(
    rule: Tensor,
    diagonal: Tensor,
    groups: tuple[tuple[int, int], ...],
    sinks: int,
    near: int,
    candidates: Tensor,
    forced: Tensor,
    limit: Tensor,
) -> None:
    """Writes ascending candidates ``(b, p, i, c)`` (-1: none) and how many are forced, and all."""
    batch, heads, rows, width = candidates.shape
    if candidates.numel() == 0:
        forced.zero_()
        limit.zero_()
        return
    c = max(triton.next_power_of_2(width), 16)
    with on_device(candidates.device):
        kernels.lattice_kernel[(rows * batch * heads,)](
            rule, batch_stride(rule), diagonal, batch_stride(diagonal), candidates, forced, limit,
            rows, heads, width, sinks, near, GROUPS=sum(groups, ()), C=c,
            num_warps=min(max(c // 128, 1), 8),
        )  # fmt: skip
