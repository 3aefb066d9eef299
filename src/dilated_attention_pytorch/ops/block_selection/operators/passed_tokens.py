"""Summaries that hand their tokens on, so that two gradients of them meet in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dilated_attention_pytorch.ops.block_selection.operators.shared import rows_of
from dilated_attention_pytorch.ops.block_selection.operators.summaries import (
    summaries_backward_op,
    summaries_op,
)


class PassedTokens(torch.autograd.Function):
    """Summaries, and the tokens for whoever reads them next.

    Attention and summaries read the same queries and keys. Autograd would write both gradients and
    add them in a third pass; here attention's gradient arrives before the summaries' kernel runs,
    which adds it as it writes. An operator of ``torch.library`` may not return its input, hence a
    function of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        valid: Tensor | None,
        pool_query: Tensor | None,
        pooling: str,
        block_size: int,
        past: bool,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Summaries ``(b, h, i, s)`` as :func:`summaries_op`, and ``x`` itself."""
        extremes = "max" in pooling or "min" in pooling
        out, place = summaries_op(x, valid, pool_query, pooling, block_size, extremes, past, starts)
        ctx.save_for_backward(place, x, valid, pool_query, starts)
        ctx.constants = pooling, block_size, past
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, more: Tensor | None) -> tuple[Any, ...]:
        """The sum of both gradients of the tokens, and the pool query's."""
        place, x, valid, pool_query, starts = ctx.saved_tensors
        if grad is None:
            return more, *(None,) * 6
        pooling, block_size, past = ctx.constants
        grad_x, grad_pool = summaries_backward_op(
            grad.contiguous(), place, x, valid, pool_query, pooling, block_size, past, starts,
            None if more is None else rows_of(more),
        )  # fmt: skip
        return grad_x, None, None if pool_query is None else grad_pool, *(None,) * 4
