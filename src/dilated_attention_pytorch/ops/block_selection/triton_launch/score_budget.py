"""Launches the kernel that counts the blocks whose expected mass reaches a threshold."""

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

# Scores that a program holds at once: 32 a thread.
_TILE = 4096


def launch_above(
    scores: Tensor,
    candidates: Tensor | None,
    rule: Tensor,
    threshold: Tensor,
    most: Tensor,
    counts: Tensor,
) -> None:
    """Writes the counts ``(b, p, i)``, contiguous; other shapes as in ``above_op``."""
    batch, heads, rows, columns = scores.shape
    if counts.numel() == 0:
        return
    if columns == 0:
        counts.zero_()
        return
    # Heads that compete share a program.
    together = heads if candidates is None else 1
    h = triton.next_power_of_2(together)
    t = max(min(_TILE // h, triton.next_power_of_2(columns)), 32)
    lists = (0, 0, 0) if candidates is None else (*plane_strides(candidates), candidates.stride(2))
    with on_device(scores.device):
        kernels.above_kernel[(rows * batch * (heads // together),)](
            scores, *scores.stride()[:3], rule if candidates is None else candidates, *lists,
            rule, batch_stride(rule), threshold, most, *plane_strides(most), counts,
            rows, columns, heads, H=h, T=t, LISTS=candidates is not None,
            num_warps=min(max(h * t // 1024, 1), 4), **overlap(scores.device),
        )  # fmt: skip
