"""Selection by the scorer that reads tokens, with fused kernels; without gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.nn.block_sparse import Selection, SelectionInputs
from dilated_attention_pytorch.nn.fused_selection import allot_budget, choose_blocks
from dilated_attention_pytorch.nn.row_budgets import row_thresholds, threshold_floor
from dilated_attention_pytorch.nn.threshold_selection import select_above
from dilated_attention_pytorch.ops.block_selection.interface import (
    find_candidates,
    low_rank_scores,
)
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


@torch.no_grad()
def score_tokens(layer: BlockSparseAdaptive, inputs: SelectionInputs) -> Tensor:
    """The layer's scores of all tiles, ``(b, pattern heads, i, j)`` float32."""
    scorer, rows = cast(LowRankScorer, layer.scorer), inputs.rows
    stride, query, lead = scorer.query_stride, inputs.query, 0
    if layer.looks_back(inputs.mask):
        # Every block's samples are then those up to its first token.
        lead = layer.block_size - stride
        behind = -query.shape[1] % layer.block_size - lead
        query = F.pad(query, (0, 0, 0, 0, lead, behind))
    spans = rows.remember(
        ("spans", layer.block_size, stride, lead),
        lambda: _sample_spans(inputs, layer.block_size, stride, lead),
    )
    return scorer.called(
        lambda query, key: low_rank_scores(
            query, key, scorer.query_map, scorer.key_map, spans, query_stride=stride,
            block_size=layer.block_size, scale=scorer.scale, pattern_heads=layer.pattern_heads,
        ),
        query, inputs.key, inputs.mask, layer.block_size,
    )  # fmt: skip


def _sample_spans(inputs: SelectionInputs, block_size: int, stride: int, lead: int) -> Tensor:
    """Keys that every ``stride``-th query sees, ``lead`` tokens before the places of a block.

    What is not there, padding and other documents than the block's see nothing, and so count for
    nothing.
    """
    mask, device = inputs.mask, inputs.query.device
    if lead == 0:
        token = torch.arange(0, mask.q_len, stride, device=device)
        found = mask.spans(token)
        if inputs.query_valid is None:
            return found
        return torch.where(inputs.query_valid[:, None, token], found, 0)
    place = torch.arange(0, ceil_div(mask.q_len, block_size) * block_size, stride, device=device)
    token = place - lead
    real = ((token >= 0) & (token < mask.q_len))[None]
    token = token.clamp(0, mask.q_len - 1)
    if inputs.query_valid is not None:
        real = real & inputs.query_valid[:, token]
    if mask.document_ids is not None:
        ids, first = mask.document_ids, place - place % block_size
        real = real & (ids[:, token] == ids[:, first])
    return torch.where(real[:, None], mask.spans(token), 0)


@torch.no_grad()
def select_by_tokens(layer: BlockSparseAdaptive, inputs: SelectionInputs) -> Selection:
    """Chooses the same blocks as the layer's PyTorch path would from the same scores.

    Nothing waits for the device.
    """
    scores = score_tokens(layer, inputs)
    if layer.config.budget == "threshold":
        least = threshold_floor(inputs, layer.config.threshold_floor, 1 - layer.densest)
        selection = select_above(
            inputs, scores, row_thresholds(layer, inputs), layer.block_size, least
        )
        layer.record_density(selection.pattern.kv_num_blocks, inputs.rows)
        return selection
    rule, rows = inputs.rule, inputs.rows
    intervals = rows.remember((rule, "intervals"), lambda: rule.intervals(rows))
    with torch.autocast(inputs.query.device.type, enabled=False):
        _, forced, limit = find_candidates(rule, rows, intervals)
        budgets = allot_budget(layer, inputs, intervals, forced, limit, None, None, scores)
        counts, indices, _, _ = choose_blocks(
            layer, inputs, intervals, None, scores, budgets, explore=False, learning=False
        )
    pattern = BlockPattern(
        counts, indices, inputs.mask.q_len, inputs.mask.kv_len,
        (layer.block_size, layer.block_size), rows.num_allowed, check_values=False,
    )  # fmt: skip
    if budgets is not None:
        budgets.hand_on()
    return Selection(pattern)
