"""Which key blocks a query block may choose at all, and which it must read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask, ceil_div, document_bounds
from dilated_attention_pytorch.runtime import tracing

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class RowRange:
    """For every query block, the key blocks that it can see: one contiguous range.

    All fields are int64 and broadcast to ``(batch, 1, i)``.

    Attributes:
        low: First visible key block.
        end: One past the last; ``end <= low`` for a row with nothing to see.
        diagonal_first: First key block at the positions of the query block's own tokens.
        diagonal_last: The last such block (two blocks if query and key blocks are not aligned).
        has_diagonal: Whether queries have positions on the key axis at all.
        document: Number of the row's document (0 without documents).
        num_documents: How many numbers there are.
        derived: What :meth:`remember` keeps.
    """

    low: Tensor
    end: Tensor
    diagonal_first: Tensor
    diagonal_last: Tensor
    has_diagonal: bool
    document: Tensor
    num_documents: int = 1
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    def remember(self, key: Any, make: Callable[[], _T]) -> _T:
        """What follows from these ranges alone: made once per ``key``, kept with them."""
        if tracing():
            return make()
        if key not in self.derived:
            # A tensor made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self.derived[key] = make()
        found: _T = self.derived[key]
        return found

    @property
    def num_allowed(self) -> Tensor:
        """Visible key blocks per query block, int32 ``(1 or batch, 1, i)``."""
        return self.remember("num_allowed", lambda: (self.end - self.low).clamp(min=0).int())


@dataclass(frozen=True, eq=False)
class Candidates:
    """The key blocks that a row may choose from.

    All tensors broadcast to ``(batch, heads, i, c)``.

    Attributes:
        indices: int64 key block numbers, ascending along ``c``. None: all key blocks (c = j).
        scored: Booleans: may be chosen by its score.
        forced: Booleans: read in any case, counted in the sparsity, without a score gradient.
    """

    indices: Tensor | None
    scored: Tensor
    forced: Tensor

    @property
    def width(self) -> int:
        """Candidates per row, c."""
        return self.scored.shape[-1]

    def keeping(self, kept: Tensor | None) -> Candidates:
        """The same, with ``kept`` (booleans, or None) forced as far as it may be chosen."""
        if kept is None:
            return self
        return Candidates(self.indices, self.scored & ~kept, self.forced | (self.scored & kept))

    def counts(self) -> tuple[Tensor, Tensor]:
        """Forced blocks of every row, and forced and other candidates, int64."""
        forced = self.forced.sum(-1)
        return forced, forced + self.scored.sum(-1)


@dataclass(frozen=True)
class CandidateRule:
    """Which of the blocks that a row sees may be chosen, and which are read in any case.

    With segments, key block j is a candidate of row i and head h if for some group g both lie in
    the same segment of ``segment_lengths[g]`` tokens and j's number inside its segment is
    ``≡ h (mod dilation_rates[g])``: LongNet's lattice (arXiv 2307.02486) at block level, shifted
    per head so that the heads together cover everything. Two heads, one group of 8 blocks with
    rate 2::

        head 0   x . x . x . x .        head 1   . x . x . x . x

    Differs from the paper: the lattice limits what can be *chosen*; it is not itself the pattern.

    Attributes:
        num_heads: Heads of the pattern.
        num_key_blocks: Key blocks in all.
        block_size: Tokens per key block.
        causal: Whether local blocks lie before the diagonal only.
        segment_lengths: Tokens per segment, one for each group, rounded up to whole blocks,
            counted from the start of the document. None: all visible blocks are candidates.
        dilation_rates: One rate for each group.
        num_local_blocks: Forced neighbours of the diagonal.
        num_sink_blocks: Forced blocks at the start of the sequence or document.
    """

    num_heads: int
    num_key_blocks: int
    block_size: int
    causal: bool
    segment_lengths: tuple[int, ...] | None = None
    dilation_rates: tuple[int, ...] | None = None
    num_local_blocks: int = 0
    num_sink_blocks: int = 0

    @property
    def _after(self) -> int:
        """Forced neighbours behind the diagonal."""
        return 0 if self.causal else self.num_local_blocks

    def build(self, rows: RowRange) -> Candidates:
        """Enumerates the candidates of every row."""
        if self.segment_lengths is None or self.dilation_rates is None:
            columns = torch.arange(self.num_key_blocks, device=rows.low.device).view(1, 1, 1, -1)
            return Candidates(None, *self._told_apart(columns, rows))
        columns = self._lattice(rows).sort(-1).values
        fresh = torch.ones_like(columns, dtype=torch.bool)
        fresh[..., 1:] = columns[..., 1:] != columns[..., :-1]
        return Candidates(columns, *self._told_apart(columns, rows, fresh))

    def groups(self) -> list[tuple[int, int]]:
        """Blocks of a segment and rate of each group; empty without segments."""
        if self.segment_lengths is None or self.dilation_rates is None:
            return []
        blocks = (ceil_div(length, self.block_size) for length in self.segment_lengths)
        return list(zip(blocks, self.dilation_rates, strict=True))

    def near_width(self, rows: RowRange) -> int:
        """The most blocks at and around the diagonal that a row is forced to read."""
        # Two diagonal blocks at most when query and key blocks have one size.
        return self.num_local_blocks + 2 + self._after if rows.has_diagonal else 0

    def width(self, rows: RowRange) -> int:
        """Columns of the enumeration, c."""
        if self.segment_lengths is None:
            return self.num_key_blocks
        lattice = sum(ceil_div(segment, rate) for segment, rate in self.groups())
        return self.num_sink_blocks + self.near_width(rows) + lattice

    def intervals(self, rows: RowRange) -> Tensor:
        """Per row ``low, end, sink_end, near_first, near_end``: int32 ``(1 or b, 5, i)``.

        Visible key blocks are ``[low, end)``; of these ``[low, sink_end)`` and
        ``[near_first, near_end)`` are forced.
        """
        if rows.has_diagonal:
            near = self._near(rows)
        else:
            near = (torch.zeros_like(rows.low), torch.zeros_like(rows.low))
        parts = (rows.low, rows.end, rows.low + self.num_sink_blocks, *near)
        return torch.cat(torch.broadcast_tensors(*parts), 1).int().contiguous()

    def _near(self, rows: RowRange) -> tuple[Tensor, Tensor]:
        """First forced block at the diagonal, and one past the last."""
        first = rows.diagonal_first - self.num_local_blocks
        return first, rows.diagonal_last + self._after + 1

    def _told_apart(
        self, columns: Tensor, rows: RowRange, fresh: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Which numbers are scored and which forced; ``fresh``: those that stand there first."""
        visible = (columns >= rows.low[..., None]) & (columns < rows.end[..., None])
        visible = visible if fresh is None else fresh & visible
        forced = columns < rows.low[..., None] + self.num_sink_blocks
        if rows.has_diagonal:
            first, end = (x[..., None] for x in self._near(rows))
            forced = forced | ((columns >= first) & (columns < end))
        forced = visible & forced
        return visible & ~forced, forced

    def _lattice(self, rows: RowRange) -> Tensor:
        """Lists lattice, local and sink blocks; -1 stands for none. ``(b, heads, i, c)``."""
        device = rows.low.device
        low, own = rows.low[..., None], rows.diagonal_first[..., None]
        head = torch.arange(self.num_heads, device=device).view(1, -1, 1, 1)

        def span(count: int) -> Tensor:
            return torch.arange(count, device=device).view(1, 1, 1, -1)

        parts = []
        for segment, rate in self.groups():
            inside = span(ceil_div(segment, rate)) * rate + head % rate
            start = (own - low).div(segment, rounding_mode="floor") * segment
            parts.append(torch.where(inside < segment, low + start + inside, -1))
        parts.append(low + span(self.num_sink_blocks))
        if rows.has_diagonal:
            first, end = (x[..., None] for x in self._near(rows))
            near = first + span(self.near_width(rows))
            # With one diagonal block the last entry is no neighbour and must not slip in.
            parts.append(torch.where(near < end, near, -1))
        shape = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
        return torch.cat([p.expand(*shape, -1) for p in parts], -1)


def list_candidates(columns: Tensor, rule: CandidateRule, rows: RowRange) -> Candidates:
    """Candidates with given numbers: int64 ``(b, heads, i, c)``, ascending, negative: none."""
    return Candidates(columns, *rule._told_apart(columns, rows))


def count_forced(intervals: Tensor) -> tuple[Tensor, Tensor]:
    """Forced and visible blocks per row, from :meth:`CandidateRule.intervals`.

    Returns:
        Two int32 tensors ``(1 or b, 1, i)``.
    """
    low, end, sink_end, near_first, near_end = intervals[:, None].unbind(2)
    end = torch.maximum(end, low)
    sink = torch.minimum(torch.maximum(sink_end, low), end)
    near = torch.minimum(near_end, end) - torch.maximum(near_first, sink)
    return sink - low + near.clamp(min=0), end - low


def row_ranges(
    mask: AttentionMask,
    block_size: tuple[int, int],
    *,
    has_diagonal: bool,
    device: torch.device,
    query_lengths: Tensor | None = None,
) -> RowRange:
    """Computes the visible range of every query block. Linear in the number of blocks.

    Where the rule is the same for all samples the result is kept for the next call on the same
    stream.

    Args:
        mask: The token rule. Documents must start at block boundaries (``documents.py`` brings
            them there).
        block_size: Tokens per query block and per key block.
        has_diagonal: Whether queries and keys are positions of one sequence.
        device: Where to build the tensors.
        query_lengths: ``(batch,)`` integers: query blocks that begin there or later see nothing.
            None: the mask's ``key_lengths``, with a diagonal and as many queries as keys.
    """
    if query_lengths is None and has_diagonal and mask.q_len == mask.kv_len:
        query_lengths = mask.key_lengths
    if mask.per_sample or tracing():
        return _row_ranges(mask, block_size, has_diagonal, device, query_lengths)
    # Another stream might read them before they are written.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return _shared_row_ranges(
        mask.q_len, mask.kv_len, mask.causal, int(mask.query_offset), block_size, has_diagonal,
        device if stream is None else stream.device, stream,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _shared_row_ranges(
    q_len: int,
    kv_len: int,
    causal: bool,
    query_offset: int,
    block_size: tuple[int, int],
    has_diagonal: bool,
    device: torch.device,
    stream: torch.cuda.Stream | None,
) -> RowRange:
    mask = AttentionMask(q_len, kv_len, causal, query_offset)
    with torch.inference_mode(False), torch.no_grad():
        return _row_ranges(mask, block_size, has_diagonal, device)


def _row_ranges(
    mask: AttentionMask,
    block_size: tuple[int, int],
    has_diagonal: bool,
    device: torch.device,
    query_lengths: Tensor | None = None,
) -> RowRange:
    size_q, size_k = block_size
    blocks_k = ceil_div(mask.kv_len, size_k)
    rows = torch.arange(ceil_div(mask.q_len, size_q), device=device).view(1, 1, -1)
    offset = mask.offset_column()
    if mask.key_lengths is not None and not has_diagonal:
        # Queries of another sequence end with the sample's own keys, not with padding of either.
        offset = offset + mask.key_lengths.view(-1, 1, 1).long() - mask.kv_len
        if query_lengths is not None:
            offset = offset + mask.q_len - query_lengths.view(-1, 1, 1).long()
    first = rows * size_q + offset
    last = (rows * size_q + size_q - 1).clamp(max=mask.q_len - 1)
    if query_lengths is not None:
        # A block's last real query: padding behind it sees nothing.
        last = torch.minimum(last, query_lengths.view(-1, 1, 1).long() - 1)
    last = last + offset
    diagonal_first = first.div(size_k, rounding_mode="floor").clamp(min=0)
    diagonal_last = last.div(size_k, rounding_mode="floor").clamp(max=blocks_k - 1)
    low = torch.zeros_like(first)
    end = torch.full_like(first, blocks_k)
    document, num_documents = torch.zeros_like(first), 1
    if mask.causal:
        end = torch.minimum(end, diagonal_last + 1)
    if mask.key_lengths is not None:
        lengths = mask.key_lengths.view(-1, 1, 1).long()
        end = torch.minimum(end, (lengths + size_k - 1).div(size_k, rounding_mode="floor"))
    if query_lengths is not None:
        end = torch.where(rows * size_q < query_lengths.view(-1, 1, 1), end, 0)
    if mask.document_ids is not None:
        document = mask.document_ids[:, None, ::size_q].long()
        num_documents = int(rows.shape[-1])
        low, stop = (x[:, None] for x in document_bounds(document[:, 0]))
        end = torch.where(document >= 0, torch.minimum(end, stop), low)
        # Ranks instead of the given numbers, so that a table per document is bounded by rows.
        document = (low == rows).long().cumsum(-1) - 1
    return RowRange(low, end, diagonal_first, diagonal_last, has_diagonal, document, num_documents)
