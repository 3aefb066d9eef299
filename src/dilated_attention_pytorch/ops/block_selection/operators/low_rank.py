"""Low-rank scores without the square of the tokens, as a PyTorch operator; no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.block_selection.triton_launch.low_rank import (
    LowRankInputs,
    launch_low_rank,
)


@torch.library.custom_op(f"{NAMESPACE}::low_rank_scores", mutates_args=())
def low_rank_op(
    query: Tensor,
    key: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    spans: Tensor,
    query_stride: int,
    block_size: int,
    scale: float,
    pattern_heads: int,
) -> Tensor:
    """:class:`LowRankScorer` on all tiles: ``(b, pattern heads, i, j)`` float32.

    Args:
        query: ``(b, n, h, d)``.
        key: ``(b, m, g, d)``, of the same dtype.
        query_map: ``(h, d, r)``.
        key_map: The same.
        spans: ``(1 or b, 2, t)`` int32: first key that every ``query_stride``-th query sees, and
            one past the last; nothing if ``end <= first``.
        query_stride: Take every so many queries.
        block_size: Tokens per block, a multiple of it.
        scale: Factor of the logits.
        pattern_heads: Divides h; the mass of neighbouring heads is averaged.
    """
    scores = _empty(query, key, block_size, pattern_heads)
    launch_low_rank(
        LowRankInputs(
            rows_of(query), rows_of(key), query_map.contiguous(), key_map.contiguous(),
            spans.contiguous(), query_stride, block_size, scale,
        ),
        scores,
    )  # fmt: skip
    return scores


def _empty(query: Tensor, key: Tensor, block_size: int, pattern_heads: int) -> Tensor:
    rows, columns = (ceil_div(x.shape[1], block_size) for x in (query, key))
    return query.new_empty(query.shape[0], pattern_heads, rows, columns, dtype=torch.float32)


@low_rank_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    spans: Tensor,
    query_stride: int,
    block_size: int,
    scale: float,
    pattern_heads: int,
) -> Tensor:
    return _empty(query, key, block_size, pattern_heads)
