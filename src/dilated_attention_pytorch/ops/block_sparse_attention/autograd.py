"""The Triton kernels as PyTorch operators: functional, traceable, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import document_bounds
from dilated_attention_pytorch.ops.block_sparse_attention import triton_launch as launch
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments
from dilated_attention_pytorch.ops.block_sparse_attention.triton_call import Call
from dilated_attention_pytorch.ops.operators import (
    NAMESPACE,
    Apply,
    differentiable,
)


def triton_attention(args: Arguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_attention` defines them."""
    pattern, mask = args.pattern, args.mask
    query, scale = args.query, args.scale
    if scale < 0:
        # The kernels take the maximum of the raw logits, which needs a positive factor.
        query, scale = -query, -scale
    bounds, key_lengths = None, mask.key_lengths
    if mask.document_ids is not None:
        bounds = torch.stack(document_bounds(mask.document_ids), 1).int()
        # Padding follows the last document.
        key_lengths = (mask.document_ids >= 0).sum(-1)
    differentiable = (query, args.key, args.value, args.block_bias, args.mass_probe)
    starts = slots = None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        transpose = pattern.transpose()
        starts, slots = transpose.offsets, transpose.slots
    per_sample = isinstance(mask.query_offset, Tensor)
    out, lse = _attend(
        _rows(query),
        _rows(args.key),
        _rows(args.value),
        pattern.kv_num_blocks,
        _rows(pattern.kv_indices),
        None if args.block_bias is None else _rows(args.block_bias),
        args.mass_probe,
        starts,
        slots,
        key_lengths,
        mask.query_offset if isinstance(mask.query_offset, Tensor) else None,
        mask.document_ids,
        bounds,
        pattern.block_size[0],
        pattern.block_size[1],
        mask.causal,
        0 if per_sample else mask.query_offset,
        scale,
    )
    return out, lse


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous, which is all that the kernels ask for."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_forward", mutates_args=())
def forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_bias: Tensor | None,
    mass_probe: Tensor | None,
    starts: Tensor | None,
    slots: Tensor | None,
    key_lengths: Tensor | None,
    query_offset: Tensor | None,
    document_ids: Tensor | None,
    bounds: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and lse; ``mass_probe``, ``starts`` and ``slots`` matter to the gradient alone."""
    call = Call(
        query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
        document_ids, bounds, block_q, block_k, causal, offset, scale,
    )  # fmt: skip
    out, lse = _empty_results(query)
    launch.launch_forward(call, out, lse)
    return out, lse


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    b, n, h, d = query.shape
    return query.new_empty(b, n, h, d), query.new_empty(b, h, n, dtype=torch.float32)


@forward_op.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(query)


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_bias: Tensor | None,
    starts: Tensor,
    slots: Tensor,
    key_lengths: Tensor | None,
    query_offset: Tensor | None,
    document_ids: Tensor | None,
    bounds: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    offset: int,
    scale: float,
    want_bias: bool,
    want_mass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, block bias and mass probe (the last two may be empty)."""
    call = Call(
        query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
        document_ids, bounds, block_q, block_k, causal, offset, scale,
    )  # fmt: skip
    dq, dk, dv, dbias, mass = _empty_gradients(query, key, kv_indices, want_bias, want_mass)
    grads = launch.Gradients(dq, dk, dv, dbias if want_bias else None, mass if want_mass else None)
    launch.launch_backward(call, out, lse, grad_out, grad_lse, starts, slots, grads)
    return dq, dk, dv, dbias, mass


def _empty_gradients(
    query: Tensor, key: Tensor, kv_indices: Tensor, want_bias: bool, want_mass: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def per_slot(wanted: bool) -> Tensor:
        shape = tuple(kv_indices.shape) if wanted else (0,)
        return query.new_empty(shape, dtype=torch.float32)

    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        key.new_empty(key.shape),
        per_slot(want_bias),
        per_slot(want_mass),
    )


@backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    want_bias, want_mass = rest[-2:]
    return _empty_gradients(query, key, kv_indices, want_bias, want_mass)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (
        query, key, value, counts, indices, bias, probe, starts, slots, lengths, offsets,
        documents, bounds, *constants,
    ) = inputs  # fmt: skip
    ctx.save_for_backward(
        *output, query, key, value, counts, indices, bias, starts, slots, lengths, offsets,
        documents, bounds,
    )  # fmt: skip
    ctx.constants = constants
    ctx.probe_dtype = None if probe is None else probe.dtype
    ctx.set_materialize_grads(False)


def _backward(
    run: Apply, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    out, lse, *saved = ctx.saved_tensors
    want_bias, want_mass = ctx.needs_input_grad[5], ctx.needs_input_grad[6]
    grad_out = torch.zeros_like(out) if grad_out is None else _rows(grad_out.to(out.dtype))
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    dq, dk, dv, dbias, mass = run(
        grad_out, grad_lse, out, lse, *saved, *ctx.constants, want_bias, want_mass
    )
    return (
        dq,
        dk,
        dv,
        None,
        None,
        dbias if want_bias else None,
        mass.to(ctx.probe_dtype) if want_mass else None,
        *(None,) * 11,
    )


_attend = differentiable(forward_op, backward_op, _setup_context, _backward)
