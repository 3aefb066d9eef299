"""Budgets that depend on nothing later as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.operators.row_shares import (
    budget_backward,
    empty_budget,
    keep_budget,
    share_inputs,
)
from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE
from dilated_attention_pytorch.ops.block_selection.triton_launch import running_budgets as launch


@torch.library.custom_op(f"{NAMESPACE}::running_budget", mutates_args=())
def running_budget_op(
    means: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    base_sparsity: Tensor,
    rule: Tensor,
    diagonal: Tensor,
    document: Tensor,
    forced: Tensor,
    limit: Tensor,
    even: Tensor | None,
    batch: int,
    heads: int,
    has_diagonal: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact budgets ``(b, p, i)``, their slope in the factor, the complexity, whole budgets."""
    call = launch.RunningInputs(
        share_inputs(means, gain, offset, base_sparsity, rule, diagonal, has_diagonal),
        document.contiguous(), forced.contiguous(), limit.contiguous(), even, bits,
    )  # fmt: skip
    outs = _empty(rule, batch, heads)
    launch.launch_running(call, *outs)
    return outs


def _empty(rule: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole = rule.new_empty(batch, heads, rule.shape[2], dtype=torch.int32)
    return *empty_budget(rule, batch, heads), whole


@running_budget_op.register_fake
def _(
    means: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    base_sparsity: Tensor,
    rule: Tensor,
    diagonal: Tensor,
    document: Tensor,
    forced: Tensor,
    limit: Tensor,
    even: Tensor | None,
    batch: int,
    heads: int,
    has_diagonal: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(rule, batch, heads)


running_budget_op.register_autograd(
    lambda ctx, *grads: budget_backward(ctx, 14, *grads), setup_context=keep_budget
)
