"""Launches the kernel that chooses the blocks of a row."""

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


@dataclass(frozen=True, eq=False)
class ChooseInputs:
    """One choice of blocks.

    Attributes:
        scores: ``(b, p, i, c)`` float32, last dimension contiguous.
        candidates: ``(1 or b, 1 or p, i, c)`` int32, or None: column c is key block c.
        rule: ``(1 or b, 5, i)`` int32.
        budget: ``(b, p, i)`` int32, forced blocks included, or None: see ``fixed_count``.
        seed: 0-dim int64, or None: no noise and no random blocks.
        temperature: 0-dim float32, of the noise.
        fixed_count: Scored blocks of every row without a ``budget``.
        explore: Random extra blocks.
    """

    scores: Tensor
    candidates: Tensor | None
    rule: Tensor
    budget: Tensor | None
    seed: Tensor | None
    temperature: Tensor | None
    fixed_count: int
    explore: int


def launch_choose(
    call: ChooseInputs,
    counts: Tensor,
    indices: Tensor,
    kept: Tensor | None,
    scored: Tensor | None,
) -> None:
    """Writes the lists ``(b, p, i, k)``, the kept tiles' scores and which were not forced."""
    batch, heads, rows, columns = call.scores.shape
    if counts.numel() == 0:
        return
    width = indices.shape[-1]
    if width == 0 or columns == 0:
        counts.zero_()
        return
    c = max(triton.next_power_of_2(columns), 32)
    candidates, noisy = call.candidates, call.seed is not None
    listed = candidates is not None
    lists = (0, 0, 0) if candidates is None else (*plane_strides(candidates), candidates.stride(2))
    with on_device(counts.device):
        kernels.choose_kernel[(rows * batch * heads,)](
            call.scores, *call.scores.stride()[:3],
            candidates if listed else call.rule, *lists,
            call.rule, batch_stride(call.rule), counts if call.budget is None else call.budget,
            call.seed if noisy else call.rule,
            call.scores if call.temperature is None else call.temperature,
            counts, indices, indices if kept is None else kept,
            indices if scored is None else scored.view(torch.uint8),
            rows, columns, heads, call.fixed_count, call.explore, width,
            C=c, W=triton.next_power_of_2(width), LISTS=listed, BUDGET=call.budget is not None,
            NOISE=noisy, EXPLORE=noisy and call.explore > 0, KEPT=kept is not None,
            EVEN=columns % 16 == 0,
            # 32 programs of one warp fit on a multiprocessor, if their registers do.
            maxnreg=64 if c <= 512 else None,
            num_warps=min(max(c // 512, 1), 32), **overlap(counts.device),
        )  # fmt: skip
