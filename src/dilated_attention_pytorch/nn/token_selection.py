"""Selection by scorers that read tokens, with fused kernels; without gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dilated_attention_pytorch.nn.block_sparse import Selection, SelectionInputs
from dilated_attention_pytorch.nn.fused_selection import allot_budget, choose_blocks
from dilated_attention_pytorch.nn.row_budgets import threshold_floor
from dilated_attention_pytorch.nn.threshold_selection import select_above
from dilated_attention_pytorch.ops.block_selection.interface import (
    find_candidates,
    low_rank_scores,
)
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer
from dilated_attention_pytorch.scoring.prototypes import PrototypeScorer

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


@torch.no_grad()
def score_tokens(layer: BlockSparseAdaptive, inputs: SelectionInputs) -> Tensor:
    """The layer's scores of all tiles, ``(b, pattern heads, i, j)`` float32."""
    scorer, rows = layer.scorer, inputs.rows
    if not isinstance(scorer, LowRankScorer):
        query, valid = layer.scope(inputs)
        return cast(PrototypeScorer, scorer)(
            query, inputs.key, layer.block_size, None,
            query_valid=valid, key_valid=inputs.key_valid,
        )  # fmt: skip
    stride = scorer.query_stride

    def spans() -> Tensor:
        sampled = torch.arange(0, inputs.mask.q_len, stride, device=inputs.query.device)
        found = inputs.mask.spans(sampled)
        if inputs.query_valid is None:
            return found
        # Padding sees nothing, and so counts for nothing.
        return torch.where(inputs.query_valid[:, None, sampled], found, 0)

    return low_rank_scores(
        inputs.query, inputs.key, scorer.query_map, scorer.key_map,
        rows.remember(("spans", stride), spans), query_stride=stride,
        block_size=layer.block_size, scale=scorer.scale, pattern_heads=layer.pattern_heads,
    )  # fmt: skip


@torch.no_grad()
def select_by_tokens(layer: BlockSparseAdaptive, inputs: SelectionInputs) -> Selection:
    """Chooses the same blocks as the layer's PyTorch path would from the same scores.

    Nothing waits for the device.
    """
    scores = score_tokens(layer, inputs)
    if layer.config.budget == "threshold":
        least = threshold_floor(inputs, layer.config.threshold_floor, 1 - layer.densest)
        selection = select_above(
            inputs, scores, layer.threshold_table().at(inputs.mask.kv_len), layer.block_size, least
        )
        layer.record_density(selection.pattern.kv_num_blocks, inputs.rows, None)
        return selection
    rule, rows = inputs.rule, inputs.rows
    intervals = rows.remember((rule, "intervals"), lambda: rule.intervals(rows))
    with torch.autocast(inputs.query.device.type, enabled=False):
        _, forced, limit = find_candidates(rule, rows, intervals)
        budget = allot_budget(layer, inputs, intervals, forced, limit, None)
        counts, indices, _, _ = choose_blocks(
            layer, inputs, intervals, None, scores, budget, explore=False, learning=False
        )
    pattern = BlockPattern(
        counts, indices, inputs.mask.q_len, inputs.mask.kv_len,
        (layer.block_size, layer.block_size), rows.num_allowed, check_values=False,
    )  # fmt: skip
    return Selection(pattern)
