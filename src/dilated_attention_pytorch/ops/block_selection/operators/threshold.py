"""Lists of the blocks that reach a threshold, as a PyTorch operator; no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.block_selection.triton_launch.threshold import launch_threshold


@torch.library.custom_op(f"{NAMESPACE}::threshold_lists", mutates_args=())
def threshold_op(
    scores: Tensor, rule: Tensor, threshold: float, own_thresholds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`threshold_budget` and the choice within it, forced blocks included.

    Args:
        scores: ``(b, p, i, j)`` of all key blocks.
        rule: ``(1 or b, 5, i)`` int32, from :meth:`CandidateRule.intervals`.
        threshold: Of the softmax over what a row sees.
        own_thresholds: ``(1 or b, 1 or p, 1 or i)``: those of samples, heads or rows in its place,
            or None.

    Returns:
        Counts ``(b, p, i)`` and ascending lists ``(b, p, i, j)``, int32.
    """
    counts, indices = _empty(scores)
    own = None if own_thresholds is None else own_thresholds.float()
    launch_threshold(rows_of(scores), rule.contiguous(), threshold, own, counts, indices)
    return counts, indices


def _empty(scores: Tensor) -> tuple[Tensor, Tensor]:
    return (
        scores.new_empty(scores.shape[:3], dtype=torch.int32),
        scores.new_empty(scores.shape, dtype=torch.int32),
    )


@threshold_op.register_fake
def _(
    scores: Tensor, rule: Tensor, threshold: float, own_thresholds: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _empty(scores)
