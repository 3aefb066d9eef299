"""Which key tokens a query token may see, and what that means for whole tiles.

One object carries causality, key lengths and packed documents, so that candidates,
budgets and every attention backend read the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def ceil_div(numerator: int, denominator: int) -> int:
    """Returns ``numerator / denominator`` rounded up, for non-negative integers.

    One block is told from many at once: a size of which ``torch.compile`` learns only later that it
    is 1 makes a reduction over nothing, which Inductor cannot write for CPUs.
    """
    if 0 < numerator <= denominator:
        return 1
    return -(-numerator // denominator)


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """The token rule: query ``n`` sees key ``m`` of the same sample if every line holds.

    * ``m < key_lengths[b]`` (if given)
    * ``m <= n + query_offset[b]`` (if ``causal``)
    * ``document_ids[b, n] == document_ids[b, m] >= 0`` (if given)

    With ``q_len=3, kv_len=5, causal=True`` and the default offset (bottom-right)::

        m: 0 1 2 3 4
        n=0  x x x . .
        n=1  x x x x .
        n=2  x x x x x

    Attributes:
        q_len: Number of query tokens, n.
        kv_len: Number of key tokens, m.
        causal: Whether later keys are hidden.
        query_offset: Key position of query 0: an int, or ``(batch,)`` integers. The default
            of the public functions is ``kv_len - q_len``.
        key_lengths: ``(batch,)`` integers or None: keys from this position on are padding.
        document_ids: ``(batch, q_len)`` int32 or None: ascending document number of each
            token, -1 for padding; needs ``q_len == kv_len``.
    """

    q_len: int
    kv_len: int
    causal: bool = False
    query_offset: int | Tensor = 0
    key_lengths: Tensor | None = None
    document_ids: Tensor | None = None

    @property
    def per_sample(self) -> bool:
        """Whether the rule differs between the samples of a batch."""
        return (
            self.key_lengths is not None
            or self.document_ids is not None
            or isinstance(self.query_offset, Tensor)
        )

    def _column(self, x: int | Tensor, rank: int) -> int | Tensor:
        """Per-sample numbers ready to broadcast against ``rank`` dimensions; an int as it is."""
        return x.view((-1,) + (1,) * (rank - 1)).long() if isinstance(x, Tensor) else x

    def offset_column(self) -> int | Tensor:
        """The query offset as an int or ``(batch, 1, 1)``, ready to broadcast."""
        return self._column(self.query_offset, 3)

    def real_keys(self) -> Tensor | None:
        """Booleans ``(batch, kv_len)``: keys that are not padding; None: none is."""
        real = None
        if self.key_lengths is not None:
            place = torch.arange(self.kv_len, device=self.key_lengths.device)
            real = place < self.key_lengths[:, None]
        if self.document_ids is not None:
            in_document = self.document_ids >= 0
            real = in_document if real is None else real & in_document
        return real

    def tokens(self, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Evaluates the rule.

        Args:
            query_index: Integers that broadcast against ``key_index``, with the batch in the
                leading dimension (size 1 or batch) and at least three dimensions.
            key_index: The same for keys.

        Returns:
            Booleans of the broadcast shape; indices outside the sequence are never allowed.
        """
        ok = (query_index < self.q_len) & (key_index >= 0) & (key_index < self.kv_len)
        rank = max(query_index.dim(), key_index.dim())
        if self.causal:
            ok = ok & (key_index <= query_index + self._column(self.query_offset, rank))
        if self.key_lengths is not None:
            ok = ok & (key_index < self._column(self.key_lengths, rank))
        if self.document_ids is not None:
            ok = ok & _same_document(self.document_ids, query_index, key_index)
        return ok

    def tiles(self, block_size: tuple[int, int], query_block: Tensor, key_block: Tensor) -> Tensor:
        """Whether a tile holds at least one allowed pair of tokens.

        Args:
            block_size: Tokens per query block and per key block.
            query_block: Query block numbers, broadcastable as in :meth:`tokens`.
            key_block: Key block numbers.

        Returns:
            Booleans of the broadcast shape.
        """
        size_q, size_k = block_size
        first_q, first_k = query_block * size_q, key_block * size_k
        last_q = (first_q + size_q - 1).clamp(max=self.q_len - 1)
        ok = (first_q < self.q_len) & (key_block >= 0) & (first_k < self.kv_len)
        rank = max(query_block.dim(), key_block.dim())
        if self.causal:
            ok = ok & (first_k <= last_q + self._column(self.query_offset, rank))
        if self.key_lengths is not None:
            ok = ok & (first_k < self._column(self.key_lengths, rank))
        if self.document_ids is not None:
            last_k = (first_k + size_k - 1).clamp(max=self.kv_len - 1)
            ids = self.document_ids
            q_low, q_high = _block_range(ids, first_q, last_q)
            k_low, k_high = _block_range(ids, first_k.clamp(max=self.kv_len - 1), last_k)
            ok = ok & (q_high >= 0) & (k_high >= 0) & (q_high >= k_low) & (k_high >= q_low)
        return ok

    def full_tiles(
        self, block_size: tuple[int, int], query_block: Tensor, key_block: Tensor
    ) -> Tensor:
        """Whether every query token of a tile sees all ``block_size[1]`` keys of it.

        Such tiles need no token mask. A partial last key block is never full; of a partial last
        query block only the tokens that exist count.

        Args:
            block_size: Tokens per query block and per key block.
            query_block: Query block numbers inside the sequence, broadcastable as in
                :meth:`tokens`.
            key_block: Key block numbers.

        Returns:
            Booleans of the broadcast shape.
        """
        size_q, size_k = block_size
        first_q, first_k = query_block * size_q, key_block * size_k
        last_q = (first_q + size_q - 1).clamp(max=self.q_len - 1)
        last_k = first_k + size_k - 1
        ok = (first_q < self.q_len) & (key_block >= 0) & (last_k < self.kv_len)
        rank = max(query_block.dim(), key_block.dim())
        if self.causal:
            ok = ok & (last_k <= first_q + self._column(self.query_offset, rank))
        if self.key_lengths is not None:
            ok = ok & (last_k < self._column(self.key_lengths, rank))
        if self.document_ids is not None:
            # Document numbers ascend: equal ends mean one document in between.
            ids = self.document_ids
            ok = ok & _same_document(ids, first_q, last_q) & _same_document(ids, first_k, last_k)
            ok = ok & _same_document(ids, first_q, first_k)
        return ok

    def spans(self, query_index: Tensor) -> Tensor:
        """The keys that queries see, which are neighbours: document numbers ascend.

        Args:
            query_index: ``(t,)`` query numbers inside the sequence.

        Returns:
            int32 ``(1 or batch, 2, t)``: the first key, and one past the last; nothing is seen
            where the second does not exceed the first.
        """
        row = query_index[None]
        first, end = torch.zeros_like(row), torch.full_like(row, self.kv_len)
        if self.causal:
            end = end.minimum(row + 1 + self._column(self.query_offset, 2))
        if self.key_lengths is not None:
            end = end.minimum(self.key_lengths[:, None].long())
        if self.document_ids is not None:
            low, high = (x[:, query_index] for x in document_bounds(self.document_ids))
            real = self.document_ids[:, query_index] >= 0
            first, end = low, torch.where(real, end.minimum(high), 0)
        return torch.stack(torch.broadcast_tensors(first, end), 1).int()

    def sample(self, index: int) -> AttentionMask:
        """The rule of one sample, as a mask of batch size 1."""
        rows = slice(index, index + 1)
        offset = self.query_offset
        return replace(
            self,
            query_offset=offset[rows] if isinstance(offset, Tensor) else offset,
            key_lengths=None if self.key_lengths is None else self.key_lengths[rows],
            document_ids=None if self.document_ids is None else self.document_ids[rows],
        )


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end (exclusive) of the document that each token belongs to.

    Args:
        document_ids: ``(batch, n)`` ascending ids; -1 for padding tokens at the end.

    Returns:
        Two ``(batch, n)`` integer tensors.
    """
    batch, length = document_ids.shape
    position = torch.arange(length, device=document_ids.device).expand(batch, length)
    fresh = torch.ones_like(document_ids, dtype=torch.bool)
    fresh[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    start = torch.where(fresh, position, 0).cummax(-1).values
    last = torch.ones_like(fresh)
    last[:, :-1] = fresh[:, 1:]
    reverse = torch.where(last, position + 1, length).flip(-1)
    end = reverse.cummin(-1).values.flip(-1)
    return start, end


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of ``(batch, n)`` at token numbers that may lie outside."""
    batch, length = table.shape
    index = index.clamp(0, length - 1).expand(batch, *index.shape[1:])
    return table.gather(1, index.flatten(1).long()).view(index.shape)


def _same_document(ids: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    of_query, of_key = _look_up(ids, query_index), _look_up(ids, key_index)
    return (of_query == of_key) & (of_query >= 0)


def _block_range(ids: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest document number in ``[first, last]``; (big, -1) if all padding."""
    low = _look_up(ids, first)
    high = torch.where(low >= 0, _look_up(ids.cummax(-1).values, last), -1)
    return torch.where(low >= 0, low, torch.iinfo(torch.int32).max), high
