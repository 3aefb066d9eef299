"""What the operators of both kinds of budgets share: inputs, outputs and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.operators.shared import rows_of
from dilated_attention_pytorch.ops.block_selection.triton_launch.row_shares import ShareInputs


def share_inputs(
    means: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    base_sparsity: Tensor,
    rule: Tensor,
    diagonal: Tensor,
    has_diagonal: bool,
) -> ShareInputs:
    """The inputs of a launch; a compiler may lay its own tensors out in another way than eager."""
    return ShareInputs(
        None if means is None else rows_of(means), gain, offset, base_sparsity,
        rule.contiguous(), diagonal.contiguous(), has_diagonal,
    )  # fmt: skip


def empty_budget(rule: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for exact budgets ``(b, p, i)``, their slope in the factor, and the complexity."""

    def per_row() -> Tensor:
        return rule.new_empty(batch, heads, rule.shape[2], dtype=torch.float32)

    return per_row(), per_row(), per_row()


def keep_budget(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What the gradient needs; gain and offset are the operator's second and third input."""
    ctx.save_for_backward(output[1], output[2])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[1:3]]
    ctx.set_materialize_grads(False)


def budget_backward(ctx: Any, inputs: int, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of an operator's ``inputs``: of gain and offset, its second and third."""
    slope, complexity = ctx.saved_tensors
    none = (None,) * (inputs - 3)
    if grad is None or ctx.dtypes[0] is None:
        return None, None, None, *none
    pull = grad * slope
    of_gain = (pull * complexity).sum((0, 2)).to(ctx.dtypes[0])
    return None, of_gain, pull.sum((0, 2)).to(ctx.dtypes[1]), *none
