"""Budgets by the scores: blocks that a row expects to attend to, whatever the even share says."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What a block's expected mass loses with each other head that expects more of it: heads that all
# want one block then cost less than their number, and the budget reaches more rows.
_CLAIMED = math.exp(-1.0)


def blocks_above(
    scores: Tensor, scored: Tensor, threshold: Tensor, most: Tensor, *, heads_compete: bool
) -> Tensor:
    """Scored blocks of each row whose softmaxed score reaches a threshold.

    Args:
        scores: ``(batch, heads, i, c)``.
        scored: Booleans that broadcast to it: which may be chosen; the softmax is over these.
        threshold: 0-dim.
        most: The most that a row may get, integers that broadcast to ``(batch, heads, i)``.
        heads_compete: Whether column c is the same block in all heads; a block then counts
            ``e**-n`` times its mass for a head with n others above it.

    Returns:
        int32 ``(batch, heads, i)``. No gradient.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log().view(1, 2, 1, 2)
        >>> count = [torch.ones(2, dtype=torch.bool), torch.tensor(0.5), torch.tensor(2)]
        >>> blocks_above(scores, *count, heads_compete=False).tolist()
        [[[1], [1]]]
        >>> blocks_above(scores, *count, heads_compete=True).tolist()
        [[[1], [0]]]
    """
    low = torch.finfo(torch.float32).min
    logits = scores.detach().float().nan_to_num(low, torch.inf, low)
    expected = logits.masked_fill(~scored, -torch.inf).softmax(-1).nan_to_num(0.0)
    heads = expected.shape[1]
    if heads_compete and heads > 1:
        above = torch.zeros_like(expected)
        for head in range(heads):
            above += expected[:, head : head + 1] > expected
        expected = expected * _CLAIMED**above
    count = ((expected >= threshold) & scored).sum(-1, dtype=torch.int32)
    return torch.minimum(count, most.to(torch.int32))


def most_by_score(keep: Tensor, allowed: Tensor, factor: float) -> Tensor:
    """The most scored blocks that scores can win a row: a multiple of its share, rounded up.

    Forced blocks do not count, so that rows that see few blocks can win one.

    Args:
        keep: Share of the visible blocks, 0-dim.
        allowed: Visible blocks per row, integers.
        factor: Of the share.

    Returns:
        int32.
    """
    # In float64 share times blocks is exact.
    return (keep.double() * factor * allowed).ceil().int()
