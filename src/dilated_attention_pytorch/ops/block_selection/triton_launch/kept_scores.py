"""Launches the kernels of the kept scores' gradient."""

from __future__ import annotations

import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.triton_device import on_device


def launch_kept_grad(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    counts: Tensor,
    indices: Tensor,
    offsets: Tensor,
    slots: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
) -> None:
    """Writes both towers' gradients from the kept tiles' ``(b, p, i, k)``; all contiguous."""
    batch, heads, rows, rank = query.shape
    keys, width = key.shape[2], indices.shape[3]
    if width == 0 or rows == 0 or keys == 0 or batch == 0:
        grad_query.zero_()
        grad_key.zero_()
        return
    r = min(triton.next_power_of_2(rank), 64)
    sizes = {"R": r, "RANK": rank, "C": 32, "num_warps": 2}
    with on_device(query.device):
        kernels.kept_query_grad_kernel[(rows * batch * heads, triton.cdiv(rank, r))](
            grad, key, indices, counts, grad_query, rows, keys, width, **sizes
        )
        kernels.kept_key_grad_kernel[(keys * batch * heads, triton.cdiv(rank, r))](
            grad, query, offsets, slots, grad_key, rows, keys, width, **sizes
        )
