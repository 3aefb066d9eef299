"""Counts of the blocks that reach a threshold, as a PyTorch operator; no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.block_selection.triton_launch.score_budget import launch_above


@torch.library.custom_op(f"{NAMESPACE}::blocks_above", mutates_args=())
def above_op(
    scores: Tensor, candidates: Tensor | None, rule: Tensor, threshold: Tensor, most: Tensor
) -> Tensor:
    """:func:`blocks_above` with the scored blocks of a rule; heads compete without lists.

    Args:
        scores: ``(b, p, i, c)``.
        candidates: ``(1 or b, 1 or p, i, c)`` int32, negative past the last, or None: column c is
            key block c.
        rule: ``(1 or b, 5, i)`` int32, from :meth:`CandidateRule.intervals`.
        threshold: 0-dim float32.
        most: ``(1 or b, 1 or p, i)`` int32.

    Returns:
        int32 ``(b, p, i)``.
    """
    counts = _empty(scores)
    launch_above(
        rows_of(scores), None if candidates is None else rows_of(candidates), rule.contiguous(),
        threshold, most.contiguous(), counts,
    )  # fmt: skip
    return counts


def _empty(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[:3], dtype=torch.int32)


@above_op.register_fake
def _(
    scores: Tensor, candidates: Tensor | None, rule: Tensor, threshold: Tensor, most: Tensor
) -> Tensor:
    return _empty(scores)
