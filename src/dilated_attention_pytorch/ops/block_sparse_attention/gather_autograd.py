"""The PyTorch backend as operators: opaque to ``torch.compile``, mappable, differentiable once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments
from dilated_attention_pytorch.ops.block_sparse_attention.gather import (
    from_blocks,
    gather_backward,
    gather_forward,
)
from dilated_attention_pytorch.ops.operators import (
    NAMESPACE,
    Apply,
    differentiable,
)
from dilated_attention_pytorch.pattern import BlockPattern


def gather_attention(args: Arguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_attention` defines them."""
    out, lse = _attend(*flatten(args))
    return out, lse


def flatten(args: Arguments) -> tuple[Any, ...]:
    """What the forward operator takes: tensors with the batch first, and plain numbers."""
    pattern, mask = args.pattern, args.mask
    per_sample = isinstance(mask.query_offset, Tensor)
    return (
        args.query,
        args.key,
        args.value,
        pattern.kv_num_blocks,
        pattern.kv_indices,
        args.block_bias,
        args.mass_probe,
        mask.key_lengths,
        mask.query_offset if per_sample else None,
        mask.document_ids,
        pattern.block_size[0],
        pattern.block_size[1],
        mask.causal,
        0 if per_sample else mask.query_offset,
        args.scale,
    )


def unflatten(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    indices: Tensor,
    block_bias: Tensor | None,
    key_lengths: Tensor | None,
    query_offset: Tensor | None,
    document_ids: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    offset: int,
    scale: float,
) -> Arguments:
    """The call that :func:`flatten` took apart, without its mass probe."""
    n, m = query.shape[1], key.shape[1]
    pattern = BlockPattern(counts, indices, n, m, (block_q, block_k), check_values=False)
    where = offset if query_offset is None else query_offset
    mask = AttentionMask(n, m, causal, where, key_lengths, document_ids)
    return Arguments(query, key, value, pattern, mask, scale, block_bias, None)


@torch.library.custom_op(f"{NAMESPACE}::gather_forward", mutates_args=())
def forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_bias: Tensor | None,
    mass_probe: Tensor | None,
    key_lengths: Tensor | None,
    query_offset: Tensor | None,
    document_ids: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and lse; ``mass_probe`` matters to the gradient alone."""
    return gather_forward(
        unflatten(
            query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
            document_ids, block_q, block_k, causal, offset, scale,
        )
    )  # fmt: skip


@forward_op.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, n, h, _ = query.shape
    block_q = rest[9]
    blocks = _blocks_like(query, block_q)
    lse = blocks.new_empty(b, h, ceil_div(n, block_q) * block_q)[:, :, :n]
    return from_blocks(blocks, b, n, h, query.dtype), lse


def _blocks_like(x: Tensor, size: int) -> Tensor:
    """The layout in which gather.py accumulates ``(b, n, h, d)``."""
    b, n, h, d = x.shape
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.new_empty(b * h * ceil_div(n, size), size, d, dtype=wide)


@torch.library.custom_op(f"{NAMESPACE}::gather_backward", mutates_args=())
def backward_op(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_bias: Tensor | None,
    key_lengths: Tensor | None,
    query_offset: Tensor | None,
    document_ids: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    offset: int,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, block bias and mass probe; empty where not needed."""
    args = unflatten(
        query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
        document_ids, block_q, block_k, causal, offset, scale,
    )  # fmt: skip
    grads = gather_backward(args, lse, grad_out, grad_lse, needs)
    dq, dk, dv, dbias, mass = (lse.new_empty(0) if x is None else x for x in grads)
    return dq, dk, dv, dbias, mass


@backward_op.register_fake
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    block_q, block_k, needs = rest[4], rest[5], rest[-1]
    results = []
    for x, size in ((query, block_q), (key, block_k), (value, block_k)):
        b, n, h, _ = x.shape
        results.append(from_blocks(_blocks_like(x, size), b, n, h, x.dtype))
    per_slot = [lse.new_empty(kv_indices.shape) for _ in range(2)]
    found = [*results, *per_slot]
    return tuple(x if needed else lse.new_empty(0) for x, needed in zip(found, needs, strict=True))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what :func:`backward` needs: the inputs and the lse."""
    (
        query, key, value, counts, indices, bias, probe, lengths, offsets, documents, *constants,
    ) = inputs  # fmt: skip
    ctx.save_for_backward(
        output[1], query, key, value, counts, indices, bias, lengths, offsets, documents
    )
    ctx.constants = constants
    ctx.probe_dtype = None if probe is None else probe.dtype
    ctx.set_materialize_grads(False)


def backward(
    run: Apply, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    """Gradients of all inputs of the forward operator; see :func:`differentiable`."""
    needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:7]]
    grads = run(grad_out, grad_lse, *ctx.saved_tensors, *ctx.constants, needs)
    dq, dk, dv, dbias, mass = (
        x if needed else None for x, needed in zip(grads, needs, strict=True)
    )
    if mass is not None:
        mass = mass.to(ctx.probe_dtype)
    return (dq, dk, dv, None, None, dbias, mass, *(None,) * 8)


_attend = differentiable(forward_op, backward_op, setup_context, backward)
