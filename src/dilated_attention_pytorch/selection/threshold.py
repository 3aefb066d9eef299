"""Budgets by a threshold on the softmaxed score: blocks are kept where attention is expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import RowRange
from dilated_attention_pytorch.selection.budget import (
    FRACTION_BITS,
    round_budget,
    rounding_phases,
    water_level_budget,
)
from dilated_attention_pytorch.selection.top_k import choose_top_k


def visible_softmax(scores: Tensor, scored: Tensor, forced: Tensor) -> Tensor:
    """Softmax over everything that a row can see, forced blocks included.

    With scores that predict the logarithm of the tile mass this is the expected mass, comparable
    between heads and rows: a head that looks at its forced blocks alone expects little elsewhere.

    Args:
        scores: ``(batch, heads, i, c)``.
        scored: Booleans that broadcast to the same shape: which may be chosen.
        forced: The same: which are read in any case.

    Returns:
        ``(batch, heads, i, c)`` float32; 0 for what is not visible. No gradient.
    """
    low = torch.finfo(torch.float32).min
    logits = scores.detach().float().nan_to_num(low, torch.inf, low)
    return logits.masked_fill(~(scored | forced), -torch.inf).softmax(-1).nan_to_num(0.0)


def threshold_budget(
    scores: Tensor, scored: Tensor, forced: Tensor, threshold: Tensor | float
) -> Tensor:
    """Scored blocks whose expected mass reaches a threshold.

    Of all choices of as many tiles, over all heads and rows that share the threshold, this one
    keeps the most expected mass: local heads get few blocks, spread-out heads many.

    Args:
        scores: ``(batch, heads, i, c)``, such as the logarithm of the tile mass.
        scored: Booleans that broadcast to the same shape: which may be chosen.
        forced: The same: which are read in any case.
        threshold: In [0, 1].

    Returns:
        int32 ``(batch, heads, i)``.

    Example:
        >>> scores = torch.tensor([0.6, 0.3, 0.1]).log().view(1, 1, 1, 3)
        >>> first = torch.tensor([True, False, False])
        >>> [int(threshold_budget(scores, ~first, first, t)) for t in (0.5, 0.2, 0.05)]
        [0, 1, 2]
    """
    p = visible_softmax(scores, scored, forced)
    return ((p >= threshold) & scored).sum(-1, dtype=torch.int32)


def floor_budget(
    share: float,
    sparsity: float,
    forced: Tensor,
    limit: Tensor,
    rows: RowRange,
    max_limit: int,
) -> Tensor:
    """What every row keeps at least: its forced blocks and a share of the rest of its even budget.

    Args:
        share: In [0, 1).
        sparsity: Mean sparsity of the even budget, :func:`water_level_budget`.
        forced: Forced blocks per row, integers that broadcast to ``(batch, heads, i)``.
        limit: Forced and candidate blocks per row.
        rows: Visible ranges.
        max_limit: An upper bound of ``limit``.

    Returns:
        int32 ``(1 or b, 1 or heads, i)``, forced blocks included; the same for all content.
    """
    shape = torch.broadcast_shapes(forced.shape, limit.shape, rows.low.shape)
    keep = torch.full(shape, 1 - sparsity, dtype=torch.float32, device=rows.low.device)
    even = water_level_budget(keep, forced, limit, rows, max_limit)
    return round_budget(forced + share * (even - forced), rows)


def peak_budget(share: float, keep: Tensor, forced: Tensor, allowed: Tensor, heads: int) -> Tensor:
    """Blocks that every row keeps by their peaks, whatever its threshold is.

    A share of what lies above the forced blocks in a row's own even budget: it depends on no other
    row. Heads round up in different rows.

    Args:
        share: In [0, 1].
        keep: Share of the visible blocks, 0-dim.
        forced: Forced blocks per row, integers that broadcast to ``(batch, heads, i)``.
        allowed: Visible blocks per row, likewise.
        heads: Of the pattern.

    Returns:
        int64 ``(1 or b, heads, i)``, without the forced blocks.

    Example:
        >>> allowed = torch.tensor([[[4, 10, 20, 40]]])
        >>> peak_budget(0.5, torch.tensor(0.25), torch.tensor(1), allowed, 1).tolist()
        [[[0, 1, 2, 5]]]
    """
    even = (keep.double() * allowed - forced).clamp(min=0)
    units = (share * even * (1 << FRACTION_BITS)).round().long()
    return (units + rounding_phases(heads, units.device)) >> FRACTION_BITS


@dataclass(frozen=True, eq=False)
class ThresholdSample:
    """What a calibration needs of the scores of one layer on one sample.

    Attributes:
        expected: Expected mass of every tile that a threshold decides on, flat.
        forced: Tiles that are read in any case.
        allowed: Tiles of dense attention.
    """

    expected: Tensor
    forced: int
    allowed: int

    @classmethod
    def of(
        cls,
        scores: Tensor,
        scored: Tensor,
        forced: Tensor,
        num_allowed: Tensor,
        least: Tensor | None = None,
        *,
        share: Tensor | None = None,
    ) -> ThresholdSample:
        """Reads the scores of a layer.

        Args:
            scores: ``(batch, heads, i, c)``.
            scored: Booleans that broadcast to it: which may be chosen.
            forced: The same: which are read in any case.
            num_allowed: Tiles of dense attention per row, broadcasts to ``(batch, heads, i)``.
            least: The same: what a row keeps at least, from :func:`floor_budget`. None: the forced
                tiles.
            share: Where rows go by thresholds of their own length: that length over the sample's,
                likewise. A row of half the length has twice the threshold
                (:meth:`ThresholdTable.at`), which half the mass against one threshold says too.
        """
        p = visible_softmax(scores, scored, forced)
        if least is not None:
            shape = torch.broadcast_shapes(p.shape, scored.shape)
            count = (least - forced.sum(-1)).expand(shape[:3])
            kept = choose_top_k(p.expand(shape), scored.expand(shape), count, shape[3])
            forced, scored = forced | kept, scored & ~kept
        if share is not None:
            p = p * share[..., None]
        scored, forced = scored.expand(p.shape), forced.expand(p.shape)
        allowed = num_allowed.expand(p.shape[:3])
        return cls(p[scored], int(forced.sum()), int(allowed.sum()))


def calibrate_threshold(samples: Sequence[ThresholdSample], sparsity: float) -> float:
    """Finds the threshold at which all samples together meet a sparsity.

    Args:
        samples: Of one layer or of many.
        sparsity: In [0, 1).

    Returns:
        A threshold above 0; above 1 if the forced blocks fill the budget already.

    Raises:
        ValueError: If there are no samples.
    """
    if not samples:
        raise ValueError("samples must hold at least one ThresholdSample, got none.")
    expected = torch.cat([s.expected for s in samples]).sort(descending=True).values
    allowed = sum(s.allowed for s in samples)
    room = round((1 - sparsity) * allowed - sum(s.forced for s in samples))
    tiny = float(torch.finfo(torch.float32).tiny)
    if room <= 0 or len(expected) == 0:
        return 2.0
    if room >= len(expected):
        return tiny
    # Between the last tile that fits and the first that does not.
    return max(float((expected[room - 1] + expected[room]) / 2), tiny)


# Room for lengths in a buffer. Its size does not depend on a calibration, so that whatever copies
# buffers from model to model, such as AveragedModel, can copy thresholds.
MOST_LENGTHS = 64
# What fills the room: an average with it is no length either.
_UNUSED = -1.0


@dataclass(frozen=True)
class ThresholdTable:
    """Thresholds by length: longer sequences spread their attention over more blocks.

    The length is that of a sample without its padding, of a document in a packed row, or of what a
    cache holds, never the batch's.

    Attributes:
        lengths: Key tokens, ascending, at most 64 of them.
        thresholds: One for each length, above 0.

    Raises:
        ValueError: If numbers are missing or out of range.
    """

    lengths: tuple[int, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks that there is a threshold for every length."""
        if not self.lengths or len(self.lengths) != len(self.thresholds):
            raise ValueError(
                f"thresholds must be one for each length, got {self.thresholds} for the lengths "
                f"{self.lengths}."
            )
        rising = all(a < b for a, b in pairwise((0, *self.lengths)))
        if not rising or len(self.lengths) > MOST_LENGTHS:
            raise ValueError(
                f"lengths must be positive and ascending, at most {MOST_LENGTHS} of them, got "
                f"{self.lengths}."
            )
        if not all(0 < x < math.inf for x in self.thresholds):
            raise ValueError(f"thresholds must be above 0 and finite, got {self.thresholds}.")

    def rows(self) -> tuple[tuple[float, float], ...]:
        """Every length with its threshold."""
        return tuple(zip(self.lengths, self.thresholds, strict=True))

    @staticmethod
    def empty_buffer() -> Tensor:
        """The buffer of a layer that has no thresholds yet."""
        return torch.full((MOST_LENGTHS, 2), _UNUSED, dtype=torch.float64, device="cpu")

    def to_buffer(self) -> Tensor:
        """The table as float64 ``(64, 2)``, for :meth:`from_buffer`."""
        return padded_buffer(torch.tensor(self.rows(), dtype=torch.float64, device="cpu"))

    @classmethod
    def from_buffer(cls, buffer: Tensor) -> ThresholdTable | None:
        """The table in a buffer, or None if it holds none; waits for the device.

        Args:
            buffer: ``(lengths, 2)``, with room behind the table or without.

        Raises:
            ValueError: If it holds something else, such as the mean of two tables.
        """
        lengths = buffer[:, 0].tolist()
        used = next((n for n, x in enumerate(lengths) if x == _UNUSED), len(lengths))
        if used == 0:
            return None
        rows, rest = buffer[:used].tolist(), lengths[used:]
        if not all(x.is_integer() for x in lengths) or any(x != _UNUSED for x in rest):
            raise ValueError(
                f"thresholds must hold whole lengths, got {lengths[: used + 1]}; calibrate again "
                "where they are a mean of several models'."
            )
        return cls(tuple(int(length) for length, _ in rows), tuple(own for _, own in rows))

    def at(self, length: int) -> float:
        """The threshold for a length.

        Between two lengths on a straight line of logarithms; outside in inverse proportion to the
        length, as the mean mass of a block falls.

        Example:
            >>> table = ThresholdTable((1024, 4096), (0.04, 0.01))
            >>> round(table.at(2048), 3), round(table.at(8192), 3)
            (0.02, 0.005)
        """
        if length <= self.lengths[0]:
            return self.thresholds[0] * self.lengths[0] / max(length, 1)
        for (low, below), (high, above) in pairwise(self.rows()):
            if length <= high:
                share = math.log(length / low) / math.log(high / low)
                a, b = math.log(below), math.log(above)
                return math.exp(a + share * (b - a))
        return self.thresholds[-1] * self.lengths[-1] / length


def fits_buffer(rows: Tensor) -> bool:
    """Whether rows have a place in a buffer: ``(lengths, 2)``."""
    return rows.dim() == 2 and len(rows) <= MOST_LENGTHS and rows.shape[1] == 2


def padded_buffer(rows: Tensor) -> Tensor:
    """Rows that fit as ``(64, 2)``."""
    buffer = rows.new_full((MOST_LENGTHS, 2), _UNUSED)
    buffer[: len(rows)] = rows
    return buffer


def filled_buffer(buffer: Tensor) -> Tensor:
    """A buffer with its room filled by what :meth:`ThresholdTable.at` says of longer sequences.

    Looks at no value, for programs that are recorded.
    """
    place = torch.arange(len(buffer), device=buffer.device)[:, None]
    last = ((buffer[:, :1] > 0).sum() - 1).clamp(min=0)
    beyond = (place - last).clamp(min=0)
    end = buffer.index_select(0, last[None])
    factor = torch.where(torch.arange(2, device=buffer.device) == 0, 2.0, 0.5)
    return torch.where(beyond > 0, end * factor.to(buffer.dtype) ** beyond, buffer)


def thresholds_at(table: Tensor, lengths: Tensor) -> Tensor:
    """:meth:`ThresholdTable.at` for many lengths on their device.

    Args:
        table: ``(entries, 2)`` of lengths, ascending, and their thresholds.
        lengths: Integers of any shape.

    Returns:
        The thresholds in that shape, in the dtype of ``table``.

    Example:
        >>> table = torch.tensor([[1024, 0.04], [4096, 0.01]])
        >>> lengths = torch.tensor([512, 2048, 8192])
        >>> [round(x, 3) for x in thresholds_at(table, lengths).tolist()]
        [0.08, 0.02, 0.005]
    """
    known, values = table.unbind(1)
    x = lengths.clamp(min=1).to(table.dtype)
    # Beyond the ends in inverse proportion, which is a straight line of logarithms too.
    known = torch.cat([known[:1] / 2, known, known[-1:] * 2])
    values = torch.cat([values[:1] * 2, values, values[-1:] / 2])
    place = torch.searchsorted(known.contiguous(), x).clamp(1, len(known) - 1)
    low, high = known[place - 1], known[place]
    share = (x / low).log() / (high / low).log()
    a, b = values[place - 1].log(), values[place].log()
    return torch.lerp(a, b, share).exp()
