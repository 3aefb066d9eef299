"""What a state keeps of blocks for the scorer, of either kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dilated_attention_pytorch.scoring.low_rank import LowRankScorer
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer
from dilated_attention_pytorch.scoring.summaries import exact_dtype

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


def key_codes(
    layer: BlockSparseAdaptive, key: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes ``(b, p, j, e)`` of blocks of keys ``(b, m, g, d)``, and their means ``(b, j, g, d)``.

    A block's code depends on it alone; adaptive budgets go by the means. Low-rank scores take no
    codes: p = e = 0.
    """
    if isinstance(layer.scorer, LowRankScorer):
        means = layer.key_means(key, valid)
        dtype = exact_dtype(layer.scorer.key_map.dtype)
        none = torch.zeros(key.shape[0], 0, means.shape[1], 0, dtype=dtype, device=key.device)
        return none, means
    with layer.exactly(key.device):
        keys, means = layer.pool_keys(key, valid)
        return _summary_scorer(layer).encode_keys(keys), means


def query_codes(layer: BlockSparseAdaptive, query: Tensor, valid: Tensor | None) -> Tensor:
    """Codes of blocks of queries ``(b, n, h, d)``, to be compared with those of keys."""
    with layer.exactly(query.device):
        return _summary_scorer(layer).encode_queries(layer.pool_queries(query, valid))


def compare(
    layer: BlockSparseAdaptive, queries: Tensor, keys: Tensor, candidates: Tensor | None
) -> Tensor:
    """Scores ``(b, p, i, c)`` of codes."""
    with layer.exactly(queries.device):
        return _summary_scorer(layer).compare(queries, keys, candidates)


def _summary_scorer(layer: BlockSparseAdaptive) -> ImportanceScorer:
    # Other kinds are refused before.
    return cast(ImportanceScorer, layer.scorer)
