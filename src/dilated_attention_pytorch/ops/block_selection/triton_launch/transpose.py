"""Launches the kernels that turn the lists of rows into lists of columns."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import overlap
from dilated_attention_pytorch.ops.triton_device import on_device


def launch_transpose(counts: Tensor, indices: Tensor, offsets: Tensor, slots: Tensor) -> None:
    """Writes ``PatternTranspose``'s tensors for contiguous lists.

    One bit per tile says whether it is kept; the bits above it in its column are its rank there.
    """
    batch, heads, rows, width = indices.shape
    columns = offsets.shape[2] - 1
    planes = batch * heads
    if rows == 0 or width == 0 or columns == 0 or planes == 0:
        offsets.zero_()
        return
    words, device = triton.cdiv(rows, 32), indices.device
    marks = torch.empty(planes, words, columns, dtype=torch.int32, device=device)
    before = torch.empty_like(marks)
    totals = torch.empty(planes, columns, dtype=torch.int32, device=device)
    w, c = triton.next_power_of_2(width), triton.next_power_of_2(columns)
    # One program for the columns of a plane while it is quick; otherwise few columns a program, so
    # that there are programs enough for the machine.
    whole = c * words <= 16384
    block = c if whole else 32
    step = min(triton.next_power_of_2(words), 8192 // block if whole else 64)
    with on_device(device):
        kernels.mark_kernel[(words * planes,)](
            indices, counts, marks, rows, columns, words, width,
            W=min(w, 64), C=min(c, 1024), num_warps=8, **overlap(device),
        )  # fmt: skip
        kernels.rank_kernel[(triton.cdiv(columns, block), planes)](
            marks, before, totals, offsets, columns, words,
            WORDS=step, C=block, WHOLE=whole, num_warps=8 if whole else 4, **overlap(device),
        )  # fmt: skip
        if not whole:
            kernels.offset_kernel[(planes,)](
                totals, offsets, columns, C=min(c, 2048), num_warps=4, **overlap(device)
            )
        block = max(1024 // w, 1)
        kernels.place_kernel[(triton.cdiv(rows, block) * planes,)](
            indices, counts, marks, before, offsets, slots, rows, columns, words, width,
            ROWS=block, W=w, num_warps=min(max(block * w // 256, 1), 8), **overlap(device),
        )  # fmt: skip
