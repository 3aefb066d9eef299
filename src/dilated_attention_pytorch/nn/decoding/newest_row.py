"""The row (query block) of each sample's newest token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import CandidateRule, RowRange
from dilated_attention_pytorch.nn.selector_state import Memory

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


@dataclass(frozen=True, eq=False)
class NewestRow:
    """The newest rows, and their places in the tables of a state.

    Attributes:
        number: ``(b,)`` int64.
        first: ``(b,)`` int64: their first tokens.
        rows: What it sees.
    """

    number: Tensor
    first: Tensor
    rows: RowRange

    @classmethod
    def of(cls, layer: BlockSparseAdaptive, memory: Memory) -> NewestRow:
        """The rows of the newest tokens that a memory counts."""
        number = (memory.lengths - 1).clamp(min=0).div(layer.block_size, rounding_mode="floor")
        own = number.view(-1, 1, 1)
        rows = RowRange(torch.zeros_like(own), own + 1, own, own, True, torch.zeros_like(own))
        return cls(number, number * layer.block_size, rows)

    def asks(self, start: Tensor, count: int, known: Tensor, step: int = 1) -> Tensor:
        """Which queries choose with ``query_scope="past"``, whichever token of the row is newest.

        Those up to the row's first token, or the first known one if none of these is.

        Args:
            start: ``(b,)`` the first query in question.
            count: Queries in question.
            known: ``(b,)`` the first query that is known.
            step: Tokens from one to the next.

        Returns:
            Booleans ``(b, count)``.
        """
        token = start[:, None] + step * torch.arange(count, device=start.device)
        return token <= torch.maximum(known, self.first)[:, None]

    def at(self, table: Tensor, step: int) -> Tensor:
        """Entries ``(b, heads, 1, ...)`` of a table by block, ``step`` after the row's own."""
        return table.gather(2, self._place(table, step))

    def put(self, table: Tensor, step: int, values: Tensor) -> None:
        """Writes them."""
        table.scatter_(2, self._place(table, step), values.to(table.dtype))

    def _place(self, table: Tensor, step: int) -> Tensor:
        index = (self.number + 1 + step).clamp(min=0)
        index = index.view(-1, 1, 1, *(1,) * (table.dim() - 3))
        return index.expand(-1, table.shape[1], 1, *table.shape[3:])


def rule_of(layer: BlockSparseAdaptive, blocks: int) -> CandidateRule:
    """What rows of a causal pass may choose among ``blocks`` blocks."""
    return CandidateRule(
        num_heads=layer.pattern_heads,
        num_key_blocks=blocks,
        block_size=layer.block_size,
        causal=True,
        segment_lengths=layer.segment_lengths,
        dilation_rates=layer.dilation_rates,
        num_local_blocks=layer.num_local_blocks,
        num_sink_blocks=layer.num_sink_blocks,
    )
