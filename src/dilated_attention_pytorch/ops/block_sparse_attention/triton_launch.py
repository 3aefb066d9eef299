"""Launches the Triton kernels of the forward and the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention import (
    triton_backward,
    triton_forward,
)
from dilated_attention_pytorch.ops.block_sparse_attention.by_product_launch import Parts, parts_of
from dilated_attention_pytorch.ops.block_sparse_attention.launch_config import (
    LaunchConfig,
    forward_config,
    key_config,
    query_config,
)
from dilated_attention_pytorch.ops.block_sparse_attention.triton_call import Call, source
from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import INTERPRETED, LOG2E
from dilated_attention_pytorch.ops.triton_device import capability, on_device, strides


def launch_forward(
    call: Call, out: Tensor, lse: Tensor, config: LaunchConfig | None = None
) -> None:
    """Writes the output ``(b, n, h, d)`` and the lse ``(b, h, n)``, both preallocated."""
    if call.empty:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    config = config or forward_config(call.tile())
    batch, q_len, num_heads, _ = call.query.shape
    pack = call.pack(config.rows, 64)
    tiles = triton.cdiv(q_len, config.rows)
    query, tma_q = source(call.query, pack, config.rows, call)
    key, tma_k = source(call.key, 1, config.columns, call)
    value, tma_v = source(call.value, 1, config.columns, call)
    tma = tma_k and tma_v
    with on_device(call.query.device):
        triton_forward.forward_kernel[(tiles, num_heads // pack, batch)](
            query if tma_q else call.query, *strides(call.query),
            key if tma else call.key, *strides(call.key),
            value if tma else call.value, *strides(call.value),
            out, *strides(out), lse,
            call.counts, *call.counts.stride(),
            call.indices, *call.indices.stride()[:3],
            *call.mask_arguments(),
            q_len, call.key.shape[1], call.offset, call.scale * LOG2E.value,
            num_heads, tiles,
            **call.constants(), PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
            TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
            **config.options(),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Gradients:
    """Preallocated results of the backward pass.

    Attributes:
        query: ``(b, n, h, d)``.
        key: ``(b, m, g, d)``.
        value: ``(b, m, g, d)``.
        block_bias: ``(b, p, i, k)`` float32 or None.
        mass: ``(b, p, i, k)`` or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    block_bias: Tensor | None
    mass: Tensor | None


def launch_backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    starts: Tensor,
    slots: Tensor,
    grads: Gradients,
    *,
    config: LaunchConfig | None = None,
    config_query: LaunchConfig | None = None,
    overlap: bool = True,
) -> None:
    """Writes all gradients.

    Args:
        call: As in the forward pass.
        out: Its output.
        lse: Its lse.
        grad_out: Gradient of the output; last dimension contiguous.
        grad_lse: Gradient of the lse, contiguous, or None.
        starts: ``PatternTranspose.offsets``.
        slots: ``PatternTranspose.slots``.
        grads: Where to write.
        config: Launch of the dK, dV kernel.
        config_query: Launch of the dQ kernel.
        overlap: Let the dQ kernel fill multiprocessors that the end of the dK, dV kernel leaves
            idle (programmatic dependent launch, Hopper and later).
    """
    batch, q_len, num_heads, _ = call.query.shape
    kv_len, num_kv_heads = call.key.shape[1:3]
    if call.empty:
        for tensor in (grads.query, grads.key, grads.value, grads.block_bias, grads.mass):
            if tensor is not None:
                tensor.zero_()
        return
    config = config or key_config(call.tile())
    query_blocks, width = call.indices.shape[2:]
    padded_len = query_blocks * call.block_q
    pack = call.pack(config.rows, 64)
    query, tma_q = source(call.query, pack, config.rows, call)
    gradient, tma_g = source(grad_out, pack, config.rows, call)
    key, tma_k = source(call.key, 1, config.columns, call)
    value, tma_v = source(call.value, 1, config.columns, call)
    tma, tma_q = tma_k and tma_v, tma_q and tma_g
    device = call.query.device
    rows = _row_pass(call, out, lse, grad_out, grad_lse)
    lse2, delta, _ = rows
    constants = call.constants()
    config_query = config_query or query_config(call.tile())
    parts = Parts.make(
        call, config_query, call.pack(config_query.rows, 64), grads.block_bias is not None,
        grads.mass is not None,
    )  # fmt: skip
    overlap = overlap and not INTERPRETED and capability(device) >= (9, 0)
    with on_device(device):
        grid = (triton.cdiv(kv_len, config.columns), batch * num_kv_heads)
        triton_backward.key_kernel[grid](
            query if tma_q else call.query, *strides(call.query),
            key if tma else call.key, *strides(call.key),
            value if tma else call.value, *strides(call.value),
            gradient if tma_q else grad_out, *strides(grad_out),
            grads.key, *strides(grads.key), grads.value, *strides(grads.value),
            lse2, delta,
            starts, *starts.stride()[:2], slots, *slots.stride()[:2],
            *call.mask_arguments(),
            q_len, kv_len, padded_len, call.offset, call.scale,
            call.scale * LOG2E.value, num_heads, query_blocks, width,
            **constants, PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
            EVEN_QUERIES=q_len % call.block_q == 0,
            TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages, OVERLAP=overlap,
            **config.options(),
        )  # fmt: skip
        _launch_query(call, grad_out, rows, grads.query, parts, config_query, overlap)
    parts.collect(call, rows[2], grads.block_bias, grads.mass)


def _row_pass(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward kernels need of every row: lse in base 2, delta, gradient norm."""
    batch, q_len, num_heads, head_dim = call.query.shape
    padded_len = call.indices.shape[2] * call.block_q
    shape = (batch, num_heads, padded_len)
    lse2, delta, norm = (lse.new_empty(shape, dtype=torch.float32) for _ in range(3))
    with on_device(call.query.device):
        triton_backward.row_kernel[(triton.cdiv(padded_len, 32), num_heads, batch)](
            out, *strides(out), grad_out, *strides(grad_out),
            lse, lse if grad_lse is None else grad_lse, lse2, delta, norm,
            q_len, padded_len, num_heads,
            ROWS=32, D=call.padded_head_dim, HEAD_DIM=head_dim, GRAD_LSE=grad_lse is not None,
            num_warps=4,
        )  # fmt: skip
    return lse2, delta, norm


def _launch_query(
    call: Call,
    grad_out: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    grad_query: Tensor,
    parts: Parts,
    config: LaunchConfig,
    overlap: bool,
) -> None:
    """The dQ kernel."""
    batch, q_len, num_heads, _ = call.query.shape
    stand_in = rows[0]
    pack = call.pack(config.rows, 64)
    tiles = triton.cdiv(q_len, config.rows)
    query, tma_q = source(call.query, pack, config.rows, call)
    gradient, tma_g = source(grad_out, pack, config.rows, call)
    key, tma_k = source(call.key, 1, config.columns, call)
    value, tma_v = source(call.value, 1, config.columns, call)
    tma, tma_q = tma_k and tma_v, tma_q and tma_g
    options = config.options() | ({"launch_pdl": True} if overlap else {})
    triton_backward.query_kernel[(tiles, num_heads // pack, batch)](
        query if tma_q else call.query, *strides(call.query),
        key if tma else call.key, *strides(call.key),
        value if tma else call.value, *strides(call.value),
        gradient if tma_q else grad_out, *strides(grad_out),
        grad_query, *strides(grad_query), *rows,
        stand_in if parts.block_bias is None else parts.block_bias,
        stand_in if parts.mass is None else parts.mass,
        call.counts, *call.counts.stride(),
        call.indices, *call.indices.stride()[:3],
        *call.mask_arguments(),
        q_len, call.key.shape[1], rows[0].shape[2], call.offset, call.scale,
        call.scale * LOG2E.value, num_heads, tiles, *call.indices.shape[2:],
        **call.constants(), PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
        GRAD_BIAS=parts.block_bias is not None, MASS=parts.mass is not None,
        PARTS=parts_of(config, pack), TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
        OVERLAP=overlap, **options,
    )  # fmt: skip
