"""How many blocks the newest row may read, by what a state remembers of the rows before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import Candidates, RowRange
from dilated_attention_pytorch.nn.decoding.newest_row import NewestRow, rule_of
from dilated_attention_pytorch.nn.held_budget import HeldBudget
from dilated_attention_pytorch.nn.row_budgets import (
    budget_by_score,
    factor_of,
    lower,
    score_bound,
    whole_samples,
)
from dilated_attention_pytorch.nn.selector_state import Memory
from dilated_attention_pytorch.selection.budget import (
    blocks_above,
    next_budget,
    round_budget,
    share_by_content,
    share_units,
    water_level_budget,
)
from dilated_attention_pytorch.selection.threshold import floor_budget, thresholds_at

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


def room(layer: BlockSparseAdaptive, rows: RowRange, blocks: int) -> tuple[Tensor, Tensor]:
    """Forced blocks of every row, and forced and candidate ones together."""
    if layer.segment_lengths is None:
        # The sinks and the neighbours of the diagonal overlap in the first rows.
        limit = rows.num_allowed.long()
        return limit.clamp(max=layer.num_sink_blocks + layer.num_local_blocks + 1), limit
    candidates = rule_of(layer, blocks).build(rows)
    forced = candidates.forced.sum(-1)
    return forced, forced + candidates.scored.sum(-1)


def row_budget(
    layer: BlockSparseAdaptive,
    memory: Memory,
    row: NewestRow,
    candidates: Candidates,
    scores: Tensor,
    complexity: Tensor | None,
    blocks: int,
) -> Tensor:
    """Blocks that the row reads, forced ones included, ``(b, p, 1)``; notes running sums."""
    config = layer.config
    forced = candidates.forced.sum(-1)
    limit = forced + candidates.scored.sum(-1)
    if config.budget == "threshold":
        by_score = budget_by_score(scores, candidates, newest_thresholds(layer, memory, row))
        if config.threshold_floor:
            rows = _rows_so_far(row, blocks)
            least = floor_budget(
                config.threshold_floor, 1 - layer.densest, *room(layer, rows, blocks), rows,
                candidates.width,
            )  # fmt: skip
            by_score = torch.maximum(by_score, _newest(row, least, layer.pattern_heads))
        return by_score
    if config.num_selected_blocks is not None:
        budget = torch.minimum(forced + config.num_selected_blocks, limit)
        return budget.expand(scores.shape[:3])
    keep = (1 - layer.base_sparsity).expand(scores.shape[:3])
    held = layer.held_budget()
    if held is not None and complexity is not None:
        factor = factor_of(layer, held, complexity)
        keep = share_by_content(keep, factor)
        if config.query_scope == "block":
            row.put(memory.factors, 0, factor)
    if config.query_scope == "past":
        even = None if held is None else held.even
        units = share_units(keep, row.rows.num_allowed, forced, limit, even)
        earned = row.at(memory.earned, -1) + units
        given = row.at(memory.given, -1)
        budget = next_budget(earned, given, forced, limit)
        row.put(memory.earned, 0, earned)
        row.put(memory.given, 0, given + budget)
    else:
        budget = _level_budget(layer, held, memory, row, candidates.width, blocks)
    if held is None or not held.scores_decide:
        return budget
    count = blocks_above(
        scores, candidates.scored, held.threshold, score_bound(layer, row.rows),
        heads_compete=candidates.indices is None,
    )  # fmt: skip
    return torch.maximum(budget, forced + count)


def newest_thresholds(layer: BlockSparseAdaptive, memory: Memory, row: NewestRow) -> Tensor:
    """The row's threshold in each sample, ``(b, 1, 1)``, for ``budget="threshold"``."""
    if layer.config.query_scope == "past":
        # Those that the row's first token sees, whichever token chooses.
        lengths = row.number * layer.block_size + 1
    else:
        lengths = whole_samples(layer, memory.lengths)
    return thresholds_at(layer.threshold_rows(), lengths.view(-1, 1, 1))


def _level_budget(
    layer: BlockSparseAdaptive,
    held: HeldBudget | None,
    memory: Memory,
    row: NewestRow,
    width: int,
    blocks: int,
) -> Tensor:
    """The row's budget in a forward pass over everything so far: a level over all its rows."""
    rows = _rows_so_far(row, blocks)
    forced, limit = room(layer, rows, blocks)
    heads = layer.pattern_heads
    keep = (1 - layer.base_sparsity).expand(rows.end.shape[0], heads, blocks)
    if held is not None:
        keep = share_by_content(keep, memory.factors[:, :, 1 : blocks + 1])
    exact = water_level_budget(keep, forced, limit, rows, width)
    even = None if held is None else held.even
    return _newest(row, round_budget(lower(exact, forced, even), rows), heads)


def _rows_so_far(row: NewestRow, blocks: int) -> RowRange:
    """All rows of a forward pass up to the newest one; those behind it see nothing."""
    number = torch.arange(blocks, device=row.number.device).view(1, 1, -1)
    end = torch.where(number <= row.number.view(-1, 1, 1), number + 1, 0)
    return RowRange(torch.zeros_like(end), end, number, number, True, torch.zeros_like(end))


def _newest(row: NewestRow, budgets: Tensor, heads: int) -> Tensor:
    """The newest row's entry of ``(b, 1 or heads, blocks)``: ``(b, heads, 1)``."""
    place = row.number.view(-1, 1, 1).expand(-1, heads, 1)
    return budgets.expand(-1, heads, -1).gather(2, place).long()
