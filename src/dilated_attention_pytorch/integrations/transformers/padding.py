"""Moves padding to the end of keys and queries, with or without a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CompactTokens:
    """Where tokens go so that padding stands at the end, and where the queries then begin.

    A cache of six slots whose first two hold padding (-), and two queries::

        given    keys - - a b c d      queries at 4: c d
        compact  keys a b c d - -      queries at 2: c d      4 keys

    Real tokens keep their order, so causal attention is the same; blocks are cut as if the sample
    had no padding.

    Attributes:
        key_order: ``(batch, kv_len)`` given position of each compact key.
        query_order: ``(batch, q_len)`` the same for queries.
        query_place: ``(batch, q_len)`` compact position of each given query.
        query_valid: ``(batch, q_len)`` booleans: given queries that are no padding.
        key_lengths: ``(batch,)`` int32: keys that are no padding.
        query_offset: ``(batch,)`` int32: compact key position of the first compact query.
    """

    key_order: Tensor
    query_order: Tensor
    query_place: Tensor
    query_valid: Tensor
    key_lengths: Tensor
    query_offset: Tensor

    @classmethod
    def of(cls, valid: Tensor, offset: Tensor, q_len: int) -> CompactTokens:
        """Plans the order. Does not wait for the device.

        Args:
            valid: ``(batch, kv_len)`` booleans: keys that are no padding.
            offset: ``(batch,)`` key position of query 0.
            q_len: Query tokens.
        """
        kv_len = valid.shape[1]
        position = torch.arange(kv_len, device=valid.device)
        past = position < offset[:, None]
        slots = offset[:, None].long() + torch.arange(q_len, device=valid.device)
        query_valid = valid.gather(1, slots.clamp(max=kv_len - 1))
        key_order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        query_order = (~query_valid).to(torch.uint8).argsort(dim=1, stable=True)
        return cls(
            key_order,
            query_order,
            query_order.argsort(dim=1),
            query_valid,
            valid.sum(1, dtype=torch.int32),
            (valid & past).sum(1, dtype=torch.int32),
        )

    @property
    def query_lengths(self) -> Tensor:
        """``(batch,)`` int32: queries that are no padding."""
        return self.query_valid.sum(1, dtype=torch.int32)

    def compact(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moves padding of ``(batch, tokens, heads, head_dim)`` tensors to the end."""
        return (
            _reorder(query, self.query_order),
            _reorder(key, self.key_order),
            _reorder(value, self.key_order),
        )

    def spread(self, out: Tensor) -> Tensor:
        """Moves the output back; padding gives 0."""
        return torch.where(self.query_valid[..., None, None], _reorder(out, self.query_place), 0)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None, None].expand(-1, -1, *x.shape[2:]))
