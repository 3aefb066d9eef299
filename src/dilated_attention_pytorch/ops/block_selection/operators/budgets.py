"""The water level's budgets as operators."""

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
from dilated_attention_pytorch.ops.block_selection.triton_launch import budgets as launch


@torch.library.custom_op(f"{NAMESPACE}::row_budget", mutates_args=())
def budget_op(
    means: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    base_sparsity: Tensor,
    rule: Tensor,
    diagonal: Tensor,
    document: Tensor,
    forced: Tensor,
    limit: Tensor,
    filled: Tensor,
    rising: Tensor,
    visible: Tensor,
    batch: int,
    heads: int,
    has_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Real-valued budgets ``(b, p, i)``, their slope in the content's factor, the complexity."""
    call = launch.BudgetInputs(
        share_inputs(means, gain, offset, base_sparsity, rule, diagonal, has_diagonal),
        document.contiguous(), forced.contiguous(), limit.contiguous(),
        filled.contiguous(), rising.contiguous(), visible.contiguous(),
    )  # fmt: skip
    exact, slope, complexity = empty_budget(rule, batch, heads)
    launch.launch_budget(call, exact, slope, complexity)
    return exact, slope, complexity


@budget_op.register_fake
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
    filled: Tensor,
    rising: Tensor,
    visible: Tensor,
    batch: int,
    heads: int,
    has_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_budget(rule, batch, heads)


budget_op.register_autograd(
    lambda ctx, *grads: budget_backward(ctx, 15, *grads), setup_context=keep_budget
)


@torch.library.custom_op(f"{NAMESPACE}::round_budget", mutates_args=())
def round_op(exact: Tensor, bits: int) -> Tensor:
    """int32 budgets whose running sums follow the exact ones; one document."""
    rounded = exact.new_empty(exact.shape, dtype=torch.int32)
    launch.launch_round(exact.contiguous(), rounded, bits)
    return rounded


@round_op.register_fake
def _(exact: Tensor, bits: int) -> Tensor:
    return exact.new_empty(exact.shape, dtype=torch.int32)
