"""Budgets by the share of everything visible that a row keeps, forced blocks included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def visible_share_budget(
    scores: Tensor, scored: Tensor, forced: Tensor, share: Tensor | float
) -> Tensor:
    """Fewest scored blocks with which a row keeps a share of its softmaxed scores.

    The softmax runs over scored and forced blocks, so a row whose forced blocks hold the share
    already gets none beside them: local heads stay cheap, spread-out heads keep more.

    Args:
        scores: ``(batch, heads, i, c)``, such as the logarithm of the tile mass.
        scored: Booleans that broadcast to the same shape: which may be chosen.
        forced: Booleans that broadcast to the same shape: which are read in any case.
        share: p in [0, 1].

    Returns:
        int32 ``(batch, heads, i)``: scored blocks to choose.

    Example:
        >>> scores = torch.tensor([0.6, 0.3, 0.1]).log().view(1, 1, 1, 3)
        >>> first = torch.tensor([True, False, False])
        >>> [int(visible_share_budget(scores, ~first, first, p)) for p in (0.5, 0.8, 0.95)]
        [0, 1, 2]
    """
    before, allowed = _share_before(scores, scored, forced)
    return ((before < share) & allowed).sum(-1, dtype=torch.int32)


def _share_before(scores: Tensor, scored: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Share kept before each scored block, best first, and which of the places hold one."""
    low = torch.finfo(torch.float32).min
    logits = scores.detach().float().nan_to_num(low, torch.inf, low)
    p = logits.masked_fill(~(scored | forced), -torch.inf).softmax(-1).nan_to_num(0.0)
    kept = p.masked_fill(~forced, 0).sum(-1, keepdim=True)
    ordered = p.masked_fill(~scored, -1.0).sort(-1, descending=True).values
    allowed = ordered >= 0
    gains = ordered.clamp(min=0)
    return kept + gains.cumsum(-1) - gains, allowed


@dataclass(frozen=True, eq=False)
class ShareSample:
    """What calibration needs of the scores of one layer on one sample.

    Attributes:
        before: Sorted shares at which a further block is taken, one number per scored block.
        forced: Tiles read in any case.
        allowed: Tiles of dense attention.
    """

    before: Tensor
    forced: float
    allowed: float

    @classmethod
    def of(
        cls, scores: Tensor, scored: Tensor, forced: Tensor, num_allowed: Tensor
    ) -> ShareSample:
        """Reads the scores of a layer; ``num_allowed`` broadcasts to ``(batch, heads, i)``."""
        before, taken = _share_before(scores, scored, forced)
        shape = scores.shape
        return cls(
            before[taken].sort().values,
            float(forced.expand(shape).sum()),
            float(num_allowed.expand(shape[:3]).sum()),
        )


def calibrate_share(samples: Sequence[ShareSample], sparsity: float) -> float:
    """Finds the one share at which all samples together meet a sparsity.

    Args:
        samples: Of one layer or of many; layers with spread-out attention then keep more.
        sparsity: In [0, 1).

    Returns:
        p in (0, 1].

    Raises:
        ValueError: If there are no samples.
    """
    if not samples:
        raise ValueError("samples must hold at least one ShareSample, got none.")
    before = torch.cat([s.before for s in samples]).sort().values
    allowed = sum(s.allowed for s in samples)
    room = round((1 - sparsity) * allowed - sum(s.forced for s in samples))
    if room <= 0:
        return 1e-6
    if room >= len(before):
        return 1.0
    # Blocks whose share before is below p are taken: p just at the first that must not be.
    return min(max(float(before[room]), 1e-6), 1.0)
