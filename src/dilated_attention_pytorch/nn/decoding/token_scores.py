"""Scores of the newest row by ``scorer="low_rank"``, which reads keys instead of summaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.decoding.newest_row import NewestRow
from dilated_attention_pytorch.nn.decoding.settings import sums_mass
from dilated_attention_pytorch.nn.selector_state import Memory, SelectorState
from dilated_attention_pytorch.nn.threshold_selection import backend_refusal
from dilated_attention_pytorch.ops.block_selection.interface import (
    kernel_unsupported_reason,
    low_rank_scores,
    low_rank_unsupported_reason,
)
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


@dataclass(frozen=True, eq=False)
class CachedKeys:
    """The keys that a choice may read, and how many of the row's queries it must rate them by.

    Attributes:
        key: ``(b, capacity, g, d)``: the cache, with the newest tokens.
        starts: ``(b,)`` integers: place of token 0, or None: 0.
        newest: Whether the row's newest sampled query alone is rated, beside the mass that those
            before it have given; otherwise all of them are.
    """

    key: Tensor
    starts: Tensor | None
    newest: bool

    @classmethod
    def of(cls, layer: BlockSparseAdaptive, state: SelectorState, key: Tensor) -> CachedKeys | None:
        """The keys for the next choice; None if the layer's scorer reads none."""
        if not isinstance(layer.scorer, LowRankScorer):
            return None
        return cls(key, state.starts, sums_mass(layer) and state.listed)

    def blocks(self, count: int, size: int) -> Tensor:
        """The keys of the first ``count`` blocks of each sample, or all that there is room for."""
        tokens = min(count * size, self.key.shape[1])
        if self.starts is None:
            return self.key[:, :tokens]
        place = self.starts.long()[:, None] + torch.arange(tokens, device=self.key.device)
        place = place.clamp(max=self.key.shape[1] - 1)[..., None, None]
        return self.key.gather(1, place.expand(-1, -1, *self.key.shape[2:]))


def token_scores(
    layer: BlockSparseAdaptive,
    memory: Memory,
    row: NewestRow,
    candidates: Tensor | None,
    cached: CachedKeys,
    blocks: int,
) -> Tensor:
    """Scores ``(b, p, 1, c)`` of the newest row: as a pass over everything so far would give them.

    With ``query_scope="block"`` the mass that the row's queries have given so far is kept.
    """
    scores = _row_scores(layer, memory, row, cached, blocks)
    if candidates is None:
        return scores
    index = candidates.clamp(0, blocks - 1)
    return scores.gather(-1, index.expand(*scores.shape[:3], -1))


def _row_scores(
    layer: BlockSparseAdaptive, memory: Memory, row: NewestRow, cached: CachedKeys, blocks: int
) -> Tensor:
    """Scores of all blocks."""
    stride, size = cast(LowRankScorer, layer.scorer).query_stride, layer.block_size
    per_block, first = size // stride, row.first
    past = layer.config.query_scope == "past"
    start = first - (size - stride) if past else first
    # Where the queries up to the row's first token are gone, those that follow stand in.
    start = torch.where(memory.known > first, memory.known, start)
    if past:
        asking = row.asks(start, per_block, memory.known, stride)
        return _rate(layer, memory, start, per_block, cached, blocks, asking)
    count = (memory.lengths - 1 - start).div(stride, rounding_mode="floor") + 1
    newest = start + (count - 1) * stride
    total = memory.masses[:, :, 1 : blocks + 1]
    if cached.newest:
        mass = _rate(layer, memory, newest, 1, cached, blocks)[:, :, 0].exp()
        begins, more = (x.view(-1, 1, 1) for x in (count == 1, newest > memory.sampled))
        total.copy_(torch.where(begins, mass, torch.where(more, total + mass, total)))
    else:
        mean = _rate(layer, memory, start, per_block, cached, blocks)[:, :, 0].exp()
        total.copy_(mean * count.view(-1, 1, 1))
    memory.sampled.copy_(newest)
    mean = (total / count.view(-1, 1, 1)).clamp(min=torch.finfo(total.dtype).tiny)
    return mean.log()[:, :, None]


def _rate(
    layer: BlockSparseAdaptive,
    memory: Memory,
    start: Tensor,
    count: int,
    cached: CachedKeys,
    blocks: int,
    asking: Tensor | None = None,
) -> Tensor:
    """Scores by the ``count`` sampled queries from token ``start`` on, as far as they are there.

    ``asking``: ``(b, count)`` booleans, which of them count at all.
    """
    scorer, size = cast(LowRankScorer, layer.scorer), layer.block_size
    query, real = memory.window("queries", start, count, step=scorer.query_stride)
    if asking is not None:
        real = real & asking
    token = start[:, None] + scorer.query_stride * torch.arange(count, device=query.device)
    last = torch.where(real, token, -1)
    key = cached.blocks(blocks, size)
    if has_kernel(layer, key, blocks):
        spans = torch.stack([torch.zeros_like(last), last + 1], 1).int()
        visible = AttentionMask(query.shape[1], key.shape[1])
        scores = scorer.called(
            lambda query, key: low_rank_scores(
                query, key, scorer.query_map, scorer.key_map, spans, query_stride=1,
                block_size=size, scale=scorer.scale, pattern_heads=layer.pattern_heads,
            ),
            query, key, visible, size,
        )  # fmt: skip
    else:
        scores = scorer.rate(query, key, last, size)
    # Room of the state that the cache has not, whose blocks nobody sees.
    missing = blocks - scores.shape[3]
    return F.pad(scores, (0, missing)) if missing else scores


def has_kernel(layer: BlockSparseAdaptive, key: Tensor, blocks: int) -> bool:
    """Whether the kernels of a forward pass serve here too."""
    if backend_refusal(layer, key.device) is not None:
        return False
    size, dim = layer.block_size, layer.head_dim
    refusal = kernel_unsupported_reason(key.device, key.dtype, size, dim, blocks)
    return refusal is None and low_rank_unsupported_reason(key.dtype, size, dim) is None
