"""Deterministic top-k: the same set on every device, ties to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_top_k(scores: Tensor, allowed: Tensor, count: Tensor, max_count: int) -> Tensor:
    """Chooses the ``count`` highest-scored allowed columns of every row.

    Ties go to the lower column; NaN ranks below everything.

    Args:
        scores: ``(..., c)``.
        allowed: Booleans that broadcast to the same shape.
        count: Integers ``(...)``; more than there are allowed columns means all of them.
        max_count: An upper bound of ``count``.

    Returns:
        Booleans ``(..., c)``. Without gradient; does not wait for the device.

    Example:
        >>> import torch
        >>> row = torch.tensor([1.0, 3.0, 3.0, 2.0])
        >>> choose_top_k(row, torch.ones(4).bool(), torch.tensor(1), 1)
        tensor([False,  True, False, False])
    """
    columns = scores.shape[-1]
    k = min(max_count, columns)
    if k == 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    rank = scores.detach().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    rank = rank.masked_fill(~allowed, -torch.inf)
    best = rank.topk(k, dim=-1).values
    place = (count.clamp(1, k) - 1).long()
    threshold = best.gather(-1, place[..., None])
    above = rank > threshold
    missing = count[..., None] - above.sum(-1, keepdim=True)
    tied = (rank == threshold) & allowed
    chosen = above | (tied & (tied.cumsum(-1) <= missing))
    return chosen & (count > 0)[..., None]
