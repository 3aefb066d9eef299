"""Budgets that depend on nothing later: neither on later content nor on the length.

The water level of ``budget.py`` falls when a sequence grows, so a row's budget depends on how much
follows. Generation cannot know that; here a row gets a share of the blocks that it sees itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import RowRange
from dilated_attention_pytorch.selection.budget import FRACTION_BITS, rounding_phases

# Keeps the running sums of one document above those of the documents before it.
_DOCUMENT_STEP = 1 << 40


def share_units(
    keep: Tensor, allowed: Tensor, forced: Tensor, limit: Tensor, even: Tensor | None = None
) -> Tensor:
    """What each row may spend, ``min(keep * allowed, limit)``, in units of ``2**-16`` blocks.

    Args:
        keep: Share κ of the visible blocks, ``(batch, heads, i)`` in [0, 1].
        allowed: Visible blocks per row, integers that broadcast to the same shape.
        forced: Forced blocks per row, likewise.
        limit: Forced and candidate blocks per row, likewise.
        even: 0-dim in [0, 1]: so much of what lies above the forced blocks. None: all of it.

    Returns:
        int64 ``(batch, heads, i)``, so that every device adds up alike.
    """
    share = keep.detach().double() * allowed
    if even is not None:
        share = even.double() * share + (1 - even.double()) * forced
    share = torch.minimum(share, limit.double())
    return (share * (1 << FRACTION_BITS)).round().long()


def next_budget(earned: Tensor, given: Tensor, forced: Tensor, limit: Tensor) -> Tensor:
    """The budget of one row from what the rows before it did.

    Args:
        earned: Sum of :func:`share_units` up to this row, ``(batch, heads, 1)``.
        given: Blocks that the rows before it got.
        forced: The row's forced blocks.
        limit: Its forced and candidate blocks.

    Returns:
        Blocks, int64: what was earned and not given (rounded), within [forced, limit].
    """
    whole = (earned + rounding_phases(earned.shape[1], earned.device)) >> FRACTION_BITS
    return torch.minimum(torch.maximum(whole - given, forced.long()), limit.long())


def running_budget(
    keep: Tensor, forced: Tensor, limit: Tensor, rows: RowRange, even: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Budgets of all rows of a causal sequence, equal to one :func:`next_budget` after another.

    :math:`b_i = \max(f_i, \lfloor \sum_{r \le i} \kappa_r a_r + \phi_h \rfloor - \sum_{r < i} b_r)`
    with the head's rounding phase φ: the share κ of the visible blocks is met by every beginning of
    the sequence, once it is long enough to pay for the forced blocks f. Rows whose candidates are
    fewer than their share (with segments) do not pass the rest on.

    Args:
        keep: κ, ``(batch, heads, i)`` in [0, 1].
        forced: Forced blocks per row, integers that broadcast to the same shape.
        limit: Forced and candidate blocks per row.
        rows: Visible ranges; its documents are budgeted separately.
        even: As in :func:`share_units`; of the whole budgets alone.

    Returns:
        The real-valued budgets, differentiable in ``keep``, and int32 whole ones, both
        ``(batch, heads, i)``.
    """
    shape = torch.broadcast_shapes(keep.shape, forced.shape, limit.shape, rows.low.shape)
    keep, forced, limit = keep.expand(shape), forced.expand(shape), limit.expand(shape)
    allowed, document = rows.num_allowed.expand(shape), rows.document.expand(shape)
    exact = torch.minimum(torch.maximum(keep * allowed, forced.float()), limit.float())
    earned = _running(share_units(keep, allowed, forced, limit, even), document)
    whole = (earned + rounding_phases(shape[1], earned.device)) >> FRACTION_BITS
    demanded = _running(forced.long(), document)
    # given = demanded + the largest surplus so far, which unrolls the recursion.
    lift = document * _DOCUMENT_STEP
    surplus = ((whole - demanded).clamp(min=0) + lift).cummax(-1).values - lift
    given = demanded + surplus
    before = torch.zeros_like(given)
    before[..., 1:] = torch.where(document[..., 1:] == document[..., :-1], given[..., :-1], 0)
    return exact, torch.minimum(given - before, limit.long()).int()


def _running(values: Tensor, document: Tensor) -> Tensor:
    """Running sums that start anew with each document."""
    total = values.cumsum(-1)
    position = torch.arange(values.shape[-1], device=values.device)
    fresh = torch.ones_like(document, dtype=torch.bool)
    fresh[..., 1:] = document[..., 1:] != document[..., :-1]
    first = torch.where(fresh, position, 0).cummax(-1).values
    return total - (total - values).gather(-1, first)
