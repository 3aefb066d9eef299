"""Summaries of blocks of tokens as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE
from dilated_attention_pytorch.ops.block_selection.triton_launch import summaries as launch


@torch.library.custom_op(f"{NAMESPACE}::block_summaries", mutates_args=())
def summaries_op(
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: str,
    block_size: int,
    want_place: bool,
    past: bool,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Summaries ``(b, h, i, s)`` in float32 and where extremes lie (empty unless wanted).

    ``pooling`` joins the names by commas; ``valid`` is boolean; ``past`` and ``starts`` as in
    ``Pooling`` and ``Tokens``.
    """
    how = launch.Pooling(tuple(pooling.split(",")), block_size, past)
    out, place = _empty_summaries(x, pooling, block_size, want_place)
    tokens = launch.Tokens(x, valid, pool_query, out, starts)
    launch.launch_summaries(tokens, how, place if want_place else None)
    return out, place


def _empty_summaries(
    x: Tensor, pooling: str, block_size: int, want_place: bool
) -> tuple[Tensor, Tensor]:
    b, n, h, d = x.shape
    blocks = ceil_div(n, block_size)
    shape = (b, h, blocks, 2, d) if want_place else (0,)
    return (
        x.new_empty((b, h, blocks, d * (pooling.count(",") + 1)), dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int16),
    )


@summaries_op.register_fake
def _(
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: str,
    block_size: int,
    want_place: bool,
    past: bool,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _empty_summaries(x, pooling, block_size, want_place)


@torch.library.custom_op(f"{NAMESPACE}::block_summaries_backward", mutates_args=())
def summaries_backward_op(
    grad: Tensor,
    place: Tensor,
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: str,
    block_size: int,
    past: bool,
    starts: Tensor | None,
    more: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens, with ``more`` added, and of the pool query (empty without one)."""
    how = launch.Pooling(tuple(pooling.split(",")), block_size, past)
    b, n, h, d = x.shape
    grad_x = x.new_empty(b, n, h, d)
    if pool_query is None:
        launch.launch_summaries_grad(grad, place, x, valid, None, how, grad_x, None, starts, more)
        return grad_x, x.new_empty(0)
    # Each block writes its share, so that the sum is deterministic.
    shares = x.new_zeros(b, h, grad.shape[2], d, dtype=torch.float32)
    launch.launch_summaries_grad(
        grad, place, x, valid, pool_query, how, grad_x, shares, starts, more
    )
    return grad_x, shares.sum((0, 2)).to(pool_query.dtype)


@summaries_backward_op.register_fake
def _(
    grad: Tensor,
    place: Tensor,
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: str,
    block_size: int,
    past: bool,
    starts: Tensor | None,
    more: Tensor | None,
) -> tuple[Tensor, Tensor]:
    pool = x.new_empty(0) if pool_query is None else torch.empty_like(pool_query)
    return x.new_empty(x.shape), pool


def _keep_summaries(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, valid, pool_query, ctx.pooling, ctx.block_size, _, ctx.past, starts = inputs
    ctx.save_for_backward(output[1], x, valid, pool_query, starts)
    ctx.set_materialize_grads(False)


def _summaries_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    place, x, valid, pool_query, starts = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    grad_x, grad_pool = summaries_backward_op(
        grad.contiguous(),
        place,
        x,
        valid,
        pool_query,
        ctx.pooling,
        ctx.block_size,
        ctx.past,
        starts,
        None,
    )
    return grad_x, None, None if pool_query is None else grad_pool, *(None,) * 5


summaries_op.register_autograd(_summaries_backward, setup_context=_keep_summaries)


@torch.library.custom_op(f"{NAMESPACE}::block_summaries_of_both", mutates_args=())
def both_summaries_op(
    x: Tensor,
    y: Tensor,
    x_valid: Tensor | None,
    y_valid: Tensor | None,
    x_pool: Tensor | None,
    y_pool: Tensor | None,
    pooling: str,
    block_size: int,
    past: bool,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`summaries_op` of two tensors in one launch; no gradient.

    Both or neither have ``valid``, likewise a pool query; dtype, batch and head_dim are equal.
    ``past`` and ``starts`` concern ``x``.
    """
    how = launch.Pooling(tuple(pooling.split(",")), block_size, past)
    outs = [_empty_summaries(t, pooling, block_size, False)[0] for t in (x, y)]
    launch.launch_summaries(
        launch.Tokens(x, x_valid, x_pool, outs[0], starts), how,
        second=launch.Tokens(y, y_valid, y_pool, outs[1]),
    )  # fmt: skip
    return outs[0], outs[1]


@both_summaries_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    x_valid: Tensor | None,
    y_valid: Tensor | None,
    x_pool: Tensor | None,
    y_pool: Tensor | None,
    pooling: str,
    block_size: int,
    past: bool,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x_out, y_out = (_empty_summaries(t, pooling, block_size, False)[0] for t in (x, y))
    return x_out, y_out
