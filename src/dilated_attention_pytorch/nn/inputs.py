"""What a layer chooses its blocks by, and what it chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import (
    CandidateRule,
    Candidates,
    RowRange,
    list_candidates,
)
from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.pattern import BlockPattern, pack_ascending
from dilated_attention_pytorch.selection.budget import round_budget, water_level_budget
from dilated_attention_pytorch.selection.top_k import choose_top_k


@dataclass(frozen=True, eq=False)
class SelectionInputs:
    """What a layer may look at when it chooses blocks.

    Attributes:
        query: ``(batch, q_len, num_heads, head_dim)``, documents aligned to blocks: what blocks are
            chosen by (``selector_query`` if the caller gave one).
        key: ``(batch, kv_len, num_kv_heads, head_dim)``, likewise.
        mask: The token rule, for this layout.
        rows: Visible key blocks of each query block.
        rule: Which blocks there are to choose from.
        query_valid: ``(1 or batch, q_len)`` booleans or None: tokens that are not padding.
        key_valid: The same for keys.
        generator: Source of randomness, None for torch's default.
        mark: By what a pass in training is known where activation checkpointing runs it again, from
            :func:`mark_pass`; None where no other pass could differ.
    """

    query: Tensor
    key: Tensor
    mask: AttentionMask
    rows: RowRange
    rule: CandidateRule
    query_valid: Tensor | None
    key_valid: Tensor | None
    generator: torch.Generator | None
    mark: Tensor | None = None
    _enumerated: list[Candidates] = field(default_factory=list, repr=False)

    @property
    def candidates(self) -> Candidates:
        """The blocks to choose from, enumerated on first use."""
        if not self._enumerated:
            self._enumerated.append(self.rule.build(self.rows))
        return self._enumerated[0]

    @property
    def intervals(self) -> Tensor:
        """What rows see and must read, :meth:`CandidateRule.intervals`."""
        return self.rows.remember((self.rule, "intervals"), lambda: self.rule.intervals(self.rows))

    def asking_if(self, asks: Tensor) -> SelectionInputs:
        """The same; what is chosen by them asks something of queries and keys only if ``asks``."""
        query, key = (torch.where(asks, x, x.detach()) for x in (self.query, self.key))
        return replace(self, query=query, key=key)

    def limited_to(self, indices: Tensor) -> SelectionInputs:
        """The same with other candidates: ``(b, p, i, c)`` ascending, negative where none."""
        return replace(self, _enumerated=[list_candidates(indices.long(), self.rule, self.rows)])

    def pattern(
        self, chosen: Tensor, width: int, *, complete: bool = False
    ) -> tuple[BlockPattern, Tensor]:
        """Packs chosen candidates into a pattern.

        Args:
            chosen: Booleans ``(b, h, i, c)``.
            width: Length of the lists, at least the most that a row chose.
            complete: Whether every candidate is certainly chosen.

        Returns:
            The pattern, and the candidate ``(b, h, i, width)`` that each of its slots came from.
        """
        indices, mask, size = self.candidates.indices, self.mask, self.rule.block_size
        slots = pack_ascending(chosen, width)
        numbers = slots
        if indices is not None:
            numbers = indices.expand(chosen.shape).gather(-1, slots.long()).int()
        count = chosen.sum(-1, dtype=torch.int32)
        used = torch.arange(width, device=chosen.device) < count[..., None]
        # Every allowed tile must be a candidate, and of the same ones in every sample.
        complete = complete and self.rule.segment_lengths is None and not mask.per_sample
        pattern = BlockPattern(
            count, torch.where(used, numbers, 0), mask.q_len, mask.kv_len, (size, size),
            self.rows.num_allowed, check_values=False, complete_for=mask if complete else None,
        )  # fmt: skip
        return pattern, slots.long()

    def listed_pattern(self, counts: Tensor, indices: Tensor) -> BlockPattern:
        """A pattern of the lists that a kernel wrote, ``(b, h, i)`` and ``(b, h, i, k)``."""
        size = self.rule.block_size
        return BlockPattern(
            counts, indices, self.mask.q_len, self.mask.kv_len, (size, size),
            self.rows.num_allowed, check_values=False,
        )  # fmt: skip

    def best(self, scores: Tensor, count: Tensor, *, complete: bool = False) -> BlockPattern:
        """The ``count`` best candidates of every row, and its forced blocks.

        Args:
            scores: Broadcasts with the candidates to ``(b, h, i, c)``.
            count: Blocks besides the forced ones, integers that broadcast to ``(b, h, i)``.
            complete: Whether every candidate is certainly chosen.
        """
        candidates = self.candidates
        shape = torch.broadcast_shapes(
            scores.shape, candidates.scored.shape, (*count.shape, 1), (*self.rows.low.shape, 1)
        )
        scored, count = candidates.scored.expand(shape), count.expand(shape[:3])
        most = bound_of(count, candidates.width)
        chosen = choose_top_k(scores.expand(shape), scored, count, most) | candidates.forced
        width = bound_of(chosen.sum(-1), candidates.width)
        return self.pattern(chosen, width, complete=complete)[0]


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen blocks, and what ties them to the scores.

    Attributes:
        pattern: The chosen blocks.
        block_bias: Logit bias per kept tile, or None.
        mass_probe: Takes the tile mass in the backward pass, or None.
        query: The queries that blocks were chosen by, for attention to read in their place if it
            would read the same: their gradients then meet in one pass. None: no matter.
        key: The same of the keys.
    """

    pattern: BlockPattern
    block_bias: Tensor | None = None
    mass_probe: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None


def even_budget(inputs: SelectionInputs, scores: Tensor, sparsity: float | Tensor) -> Tensor:
    """Blocks per row besides the forced ones, int32 ``(b, h, i)``: the same for every head.

    Args:
        inputs: What a layer chooses by.
        scores: ``(b, h, i, c)``, for its shape.
        sparsity: Mean sparsity to meet, forced blocks included; a 0-dim tensor or a number.
    """
    candidates, rows = inputs.candidates, inputs.rows
    forced, limit = candidates.counts()
    shape = torch.broadcast_shapes(scores.shape[:3], limit.shape)
    keep = torch.ones(shape, dtype=torch.float32, device=scores.device) - sparsity
    exact = water_level_budget(keep, forced, limit, rows, candidates.width)
    return (round_budget(exact, rows) - forced).clamp(min=0)


def bound_of(count: Tensor, width: int | Callable[[], int]) -> int:
    """An upper bound of ``count``: the largest on a CPU; else ``width``, to wait for nothing."""
    if count.device.type == "cpu" and not torch.compiler.is_compiling():
        return int(count.max()) if count.numel() else 0
    return width() if callable(width) else width


@dataclass(frozen=True, eq=False)
class OwnBlocks:
    """For every block of queries the key block of its first token, without what comes later.

    Attributes:
        key: ``(batch, i * block_size, num_kv_heads, head_dim)``: block i stands for row i.
        valid: ``(batch, i * block_size)`` booleans: keys that the first token of the row sees.
        rows: ``(1, 1, i, 1)``: the block in ``key`` of every row.
        number: ``(1 or batch, 1, i, 1)``: the key block that it is.
    """

    key: Tensor
    valid: Tensor
    rows: Tensor
    number: Tensor

    @classmethod
    def of(cls, inputs: SelectionInputs, block_size: int) -> OwnBlocks:
        """Takes the keys of a causal call."""
        mask, key = inputs.mask, inputs.key
        rows = torch.arange(ceil_div(mask.q_len, block_size), device=key.device).view(1, 1, -1)
        first = rows * block_size + mask.offset_column()
        number = first.div(block_size, rounding_mode="floor")
        token = number[..., None] * block_size + torch.arange(block_size, device=key.device)
        real = (token <= first[..., None]) & (token >= 0) & (token < mask.kv_len)
        token = token.clamp(0, max(mask.kv_len - 1, 0)).flatten(1).expand(len(key), -1)
        real = real.flatten(1).expand(len(key), -1)
        if not mask.kv_len:
            key = key.new_zeros(len(key), 1, *key.shape[2:])
        elif inputs.key_valid is not None:
            real = real & inputs.key_valid.expand(len(key), -1).gather(1, token)
        own = key.gather(1, token[..., None, None].expand(-1, -1, *key.shape[2:]))
        return cls(own, real, rows[..., None], number[..., None])

    def place(self, scores: Tensor, own: Tensor, numbers: Tensor | None) -> Tensor:
        """Puts the scores of the rows' own blocks in, and leaves later blocks without any.

        Args:
            scores: ``(batch, heads, i, c)``.
            own: ``(batch, heads, i, 1)``.
            numbers: ``(1 or batch, 1 or heads, i, c)`` key blocks of the columns; None: all.
        """
        if numbers is None:
            numbers = torch.arange(scores.shape[-1], device=scores.device)
        scores = torch.where(numbers == self.number, own, scores)
        return torch.where(numbers > self.number, -torch.inf, scores)
