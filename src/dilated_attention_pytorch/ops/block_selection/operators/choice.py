"""The choice of blocks as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.block_selection.triton_launch import choice as launch


@torch.library.custom_op(f"{NAMESPACE}::choose_blocks", mutates_args=())
def choose_op(
    scores: Tensor,
    candidates: Tensor | None,
    rule: Tensor,
    budget: Tensor | None,
    seed: Tensor | None,
    temperature: Tensor | None,
    fixed_count: int,
    explore: int,
    width: int,
    want_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, lists, and (if wanted) the kept tiles' scores and whether each was not forced."""
    call = launch.ChooseInputs(
        rows_of(scores), candidates, rule.contiguous(),
        None if budget is None else budget.contiguous(), seed, temperature, fixed_count, explore,
    )  # fmt: skip
    counts, indices, kept, scored = _empty_choice(scores, width, want_kept)
    launch.launch_choose(
        call, counts, indices, kept if want_kept else None, scored if want_kept else None
    )
    return counts, indices, kept, scored


def _empty_choice(
    scores: Tensor, width: int, want_kept: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, p, i, _ = scores.shape
    shape = (b, p, i, width)
    side = shape if want_kept else (0,)
    return (
        scores.new_empty((b, p, i), dtype=torch.int32),
        scores.new_empty(shape, dtype=torch.int32),
        scores.new_empty(side, dtype=torch.float32),
        scores.new_empty(side, dtype=torch.bool),
    )


@choose_op.register_fake
def _(
    scores: Tensor,
    candidates: Tensor | None,
    rule: Tensor,
    budget: Tensor | None,
    seed: Tensor | None,
    temperature: Tensor | None,
    fixed_count: int,
    explore: int,
    width: int,
    want_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_choice(scores, width, want_kept)
