"""The kept tiles' scores as an operator, which has their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE
from dilated_attention_pytorch.ops.block_selection.triton_launch import kept_scores as launch


@torch.library.custom_op(f"{NAMESPACE}::kept_scores", mutates_args=())
def kept_op(
    query: Tensor,
    key: Tensor,
    kept: Tensor,
    counts: Tensor,
    indices: Tensor,
    offsets: Tensor,
    slots: Tensor,
) -> Tensor:
    """The kept tiles' scores, tied to the towers that they are products of."""
    return kept.clone()


@kept_op.register_fake
def _(query: Tensor, key: Tensor, kept: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(kept)


@torch.library.custom_op(f"{NAMESPACE}::kept_scores_backward", mutates_args=())
def kept_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    counts: Tensor,
    indices: Tensor,
    offsets: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of both towers, over the kept tiles alone; deterministic."""
    query, key = query.contiguous(), key.contiguous()
    grads = torch.empty_like(query), torch.empty_like(key)
    launch.launch_kept_grad(
        grad, query, key, counts.contiguous(), indices.contiguous(), offsets, slots, *grads
    )
    return grads


@kept_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _keep_kept(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    query, key, _, *lists = inputs
    ctx.save_for_backward(query, key, *lists)


def _kept_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_query, of_key = kept_backward_op(grad.contiguous(), *ctx.saved_tensors)
    return of_query, of_key, None, None, None, None, None


kept_op.register_autograd(_kept_backward, setup_context=_keep_kept)
