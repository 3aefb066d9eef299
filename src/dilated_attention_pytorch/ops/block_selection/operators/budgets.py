"""How many blocks each row may read, as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE, rows_of
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
    max_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Real-valued budgets ``(b, p, i)``, their slope in the content's factor, the complexity."""
    # A compiler may lay its own tensors out in another way than eager PyTorch.
    call = launch.BudgetInputs(
        None if means is None else rows_of(means), gain, offset, base_sparsity,
        rule.contiguous(), diagonal.contiguous(), document.contiguous(), forced.contiguous(),
        limit.contiguous(), filled.contiguous(), rising.contiguous(), visible.contiguous(),
        has_diagonal, max_factor,
    )  # fmt: skip
    exact, slope, complexity = _empty_budget(rule, batch, heads)
    launch.launch_budget(call, exact, slope, complexity)
    return exact, slope, complexity


def _empty_budget(rule: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    def per_row() -> Tensor:
        return rule.new_empty(batch, heads, rule.shape[2], dtype=torch.float32)

    return per_row(), per_row(), per_row()


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
    max_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_budget(rule, batch, heads)


def _keep_budget(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[1:3]]
    ctx.set_materialize_grads(False)


def _budget_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    slope, complexity = ctx.saved_tensors
    none = (None,) * 13
    if grad is None or ctx.dtypes[0] is None:
        return None, None, None, *none
    pull = grad * slope
    of_gain = (pull * complexity).sum((0, 2)).to(ctx.dtypes[0])
    return None, of_gain, pull.sum((0, 2)).to(ctx.dtypes[1]), *none


budget_op.register_autograd(_budget_backward, setup_context=_keep_budget)


@torch.library.custom_op(f"{NAMESPACE}::round_budget", mutates_args=())
def round_op(exact: Tensor, bits: int) -> Tensor:
    """int32 budgets whose running sums follow the exact ones; one document."""
    rounded = exact.new_empty(exact.shape, dtype=torch.int32)
    launch.launch_round(exact.contiguous(), rounded, bits)
    return rounded


@round_op.register_fake
def _(exact: Tensor, bits: int) -> Tensor:
    return exact.new_empty(exact.shape, dtype=torch.int32)
