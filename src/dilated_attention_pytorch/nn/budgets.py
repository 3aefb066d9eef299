"""The kinds of budgets: a share of what rows see, a number of blocks, or a threshold.

``budget_of`` is the one place that reads ``AdaptiveConfig.budget``.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar, cast

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import CandidateRule, Candidates, RowRange
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.budget_layer import Budget, BudgetLayer, RowBudgets, Scored
from dilated_attention_pytorch.nn.held_budget import HeldBudget
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.nn.state import Memory, NewestRow
from dilated_attention_pytorch.ops.block_selection.interface import (
    count_above,
    row_budget,
    threshold_lists,
)
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.selection.budget import (
    LEAST_FACTOR,
    MOST_FACTOR,
    MOST_REACH,
    blocks_above,
    content_complexity,
    documents_reach,
    most_by_score,
    most_scored_blocks,
    most_visible_blocks,
    most_visible_share,
    next_budget,
    round_budget,
    running_budget,
    seen_blocks,
    share_by_content,
    share_units,
    unit_means,
    water_level_budget,
)
from dilated_attention_pytorch.selection.threshold import (
    ThresholdSample,
    floor_budget,
    threshold_budget,
    thresholds_at,
)

_Lengths = TypeVar("_Lengths", bound=int | Tensor)


class ShareBudget(Budget):
    """``budget="fixed"``: the share ``1 - base_sparsity`` of what the rows see, as even as it goes.

    With ``query_scope="past"`` every row gets its share of the blocks that it sees itself, or of as
    many as :attr:`HeldBudget.reach` says.
    """

    by_share = True

    def rows(self, layer: BudgetLayer, scored: Scored) -> RowBudgets:
        """Shares of all rows; with ``by_content`` the larger of those and what scores win."""
        inputs, rows = scored.inputs, scored.inputs.rows
        held = None if layer.keeps_all else layer.held_budget(inputs.mark)
        back = layer.looks_back(inputs.mask)
        if held is not None and held.moves is not None and back:
            held = dataclasses.replace(held, reach=documents_reach(rows))
        share = self._shares_by_kernels if scored.kernels else self._shares
        exact, whole = share(layer, scored, held)
        layer.record_density(exact, rows)
        # As it is now, for a backward pass that may come after a change.
        keep = 1 - layer.base_sparsity.detach()
        if held is None or not held.scores_decide:
            return RowBudgets(whole, keep)
        most = score_bound(layer, seen_blocks(rows.num_allowed, held.reach if back else None))
        if scored.kernels:
            count = count_above(
                scored.scores, scored.numbers, inputs.intervals, held.threshold, most, held.heads
            )
        else:
            count = blocks_above(
                scored.scores, inputs.candidates.scored, held.threshold, most, held.heads,
                heads_compete=scored.numbers is None,
            )  # fmt: skip
        by_score = scored.forced + count
        larger = torch.maximum(whole, by_score.to(whole.dtype))
        return RowBudgets(larger, keep, by_score > whole, held, exact, rows.num_allowed)

    def _shares(
        self, layer: BudgetLayer, scored: Scored, held: HeldBudget | None
    ) -> tuple[Tensor, Tensor]:
        """Real-valued budgets of the rows, and lowered integer ones."""
        inputs, rows, forced = scored.inputs, scored.inputs.rows, scored.forced
        shape = torch.broadcast_shapes(scored.scores.shape[:3], scored.limit.shape)
        keep, even, reach = (1 - layer.base_sparsity).expand(shape), None, None
        if held is not None:
            past = layer.looks_back(inputs.mask)
            complexity = content_complexity(scored.key_means(), rows, past_only=past)
            keep = share_by_content(keep, content_factor(layer, held, complexity))
            even, reach = held.even, held.reach
        if layer.looks_back(inputs.mask):
            return running_budget(keep, forced, scored.limit, rows, even, reach)
        exact = water_level_budget(keep, forced, scored.limit, rows, inputs.rule.width(rows))
        return exact, round_budget(lower(exact, forced, even), rows)

    def _shares_by_kernels(
        self, layer: BudgetLayer, scored: Scored, held: HeldBudget | None
    ) -> tuple[Tensor, Tensor]:
        inputs = scored.inputs
        means = gain = offset = even = reach = None
        if held is not None:
            gain, offset = layer.budget_terms(held)
            even, reach, means = held.even, held.reach, scored.key_means().transpose(1, 2)
        whole, exact = row_budget(
            inputs.rule, inputs.rows, inputs.intervals, scored.forced, scored.limit,
            layer.base_sparsity, batch=inputs.query.shape[0], means=means, gain=gain,
            offset=offset, even=even, reach=reach, running=layer.looks_back(inputs.mask),
        )  # fmt: skip
        return exact, whole

    def most(self, layer: BudgetLayer, inputs: SelectionInputs) -> int:
        """Of a level, or of a row by itself where that can be more."""
        mask, width = inputs.mask, inputs.rule.width(inputs.rows)
        blocks = -(-mask.kv_len // layer.block_size)
        alone = self.most_of_one(layer, blocks, width)
        if layer.looks_back(mask):
            return alone
        if mask.per_sample:
            return width
        if layer.segment_lengths is None:
            if self.by_content:
                # Scores can win a row a share of what it sees, whatever the level over all rows
                # is; and no level is above the share of the row that sees most.
                return alone
            # An int: with one offset per sample the width was returned above.
            most = most_visible_blocks(
                mask.q_len, mask.kv_len, mask.causal, cast(int, mask.query_offset),
                layer.block_size, self._most_kept(layer),
            )  # fmt: skip
            return min(width, most)
        if torch.compiler.is_compiling():
            # Counting the lattice takes tensors, whose values would be symbols. Candidates of
            # segments do not grow with the length, so this stays small.
            return width
        by_level = most_scored_blocks(
            mask.q_len, mask.kv_len, mask.causal, int(mask.query_offset),
            inputs.rows.has_diagonal, layer.block_size, layer.segment_lengths,
            layer.dilation_rates, layer.pattern_heads, layer.num_local_blocks,
            layer.num_sink_blocks, self._most_kept(layer),
        )  # fmt: skip
        return min(width, max(by_level, alone if self.by_content else 0))

    def most_of_one(self, layer: BudgetLayer, num_blocks: int, width: int) -> int:
        """Its share, rounded up."""
        # With "past" a row may count as seeing more than there is.
        if self.by_content and layer.past:
            num_blocks = max(num_blocks, MOST_REACH)
        return min(width, most_visible_share(num_blocks, self._most_kept(layer)))

    def _most_kept(self, layer: BudgetLayer) -> float:
        """The largest share of its visible blocks that a row can get.

        While compiling a power of two, which schedules seldom move.
        """
        if torch.compiler.is_compiling():
            # With dynamic shapes the compiler takes numbers of modules, and of globals, for
            # symbols, and no size can be made of a power of one: so it counts from 2 or 1.
            share, left = 2.0 if self.by_content else 1.0, layer.halvings
            while left > 0:
                share, left = share * 0.5, left - 1
            return min(share, 1.0)
        factor, share = MOST_FACTOR if self.by_content else 1.0, layer.densest
        return min(share * factor, 1.0)

    def remember(
        self, layer: BudgetLayer, memory: Memory, rows: RowRange, means: Tensor | None, blocks: int
    ) -> None:
        """Contents and running sums of the rows so far."""
        keep, even = (1 - layer.base_sparsity).expand(1, layer.pattern_heads, blocks), None
        held, reach = layer.held_budget(), None
        if held is not None and means is not None:
            even, reach = held.even, held.reach
            memory.unit_sums[:, :, 1 : blocks + 1] = unit_means(means).cumsum(2)
            complexity = content_complexity(means, rows, past_only=layer.past)
            factor = content_factor(layer, held, complexity)
            if not layer.past:
                memory.factors[:, :, 1 : blocks + 1] = factor
            keep = share_by_content(keep, factor)
        if layer.past:
            forced, limit = room(layer, rows, blocks)
            seen = seen_blocks(rows.num_allowed, reach)
            units = share_units(keep, seen, forced, limit, even)
            memory.earned[:, :, 1 : blocks + 1] = units.cumsum(-1)
            _, budget = running_budget(keep, forced, limit, rows, even, reach)
            memory.given[:, :, 1 : blocks + 1] = budget.cumsum(-1)

    def next_row(
        self,
        layer: BudgetLayer,
        memory: Memory,
        row: NewestRow,
        candidates: Candidates,
        scores: Tensor,
        complexity: Tensor | None,
        blocks: int,
    ) -> Tensor:
        """The next of the running shares, or the row's place in a level over all rows so far."""
        forced, limit = candidates.counts()
        keep = (1 - layer.base_sparsity).expand(scores.shape[:3])
        held = layer.held_budget()
        reach = None if held is None or not layer.past else held.reach
        seen = seen_blocks(row.rows.num_allowed, reach)
        if held is not None and complexity is not None:
            factor = content_factor(layer, held, complexity)
            keep = share_by_content(keep, factor)
            if not layer.past:
                row.put(memory.factors, 0, factor)
        if layer.past:
            even = None if held is None else held.even
            units = share_units(keep, seen, forced, limit, even)
            earned = row.at(memory.earned, -1) + units
            given = row.at(memory.given, -1)
            budget = next_budget(earned, given, forced, limit)
            row.put(memory.earned, 0, earned)
            row.put(memory.given, 0, given + budget)
        else:
            budget = self._level_of_one(layer, held, memory, row, candidates.width, blocks)
        if held is None or not held.scores_decide:
            return budget
        count = blocks_above(
            scores, candidates.scored, held.threshold, score_bound(layer, seen), held.heads,
            heads_compete=candidates.indices is None,
        )  # fmt: skip
        return torch.maximum(budget, forced + count)

    def _level_of_one(
        self,
        layer: BudgetLayer,
        held: HeldBudget | None,
        memory: Memory,
        row: NewestRow,
        width: int,
        blocks: int,
    ) -> Tensor:
        """The row's budget in a forward pass over everything so far: a level over all its rows."""
        rows, heads = row.so_far(blocks), layer.pattern_heads
        forced, limit = room(layer, rows, blocks)
        keep = (1 - layer.base_sparsity).expand(rows.end.shape[0], heads, blocks)
        if held is not None:
            keep = share_by_content(keep, memory.factors[:, :, 1 : blocks + 1])
        exact = water_level_budget(keep, forced, limit, rows, width)
        even = None if held is None else held.even
        return row.newest(round_budget(lower(exact, forced, even), rows), heads)


class ContentBudget(ShareBudget):
    """``budget="adaptive"``: shares by how unlike the contents are, and by the scores.

    :class:`HeldBudget` holds their mean while the layer trains.
    """

    by_content = True


class CountBudget(Budget):
    """``num_selected_blocks``: so many blocks besides the forced ones for every row."""

    def __init__(self, count: int) -> None:
        self.count = count

    def rows(self, layer: BudgetLayer, scored: Scored) -> RowBudgets:
        """The number, or all candidates."""
        whole = torch.minimum(scored.forced + self.count, scored.limit)
        whole = whole.expand(scored.scores.shape[:3])
        layer.record_density(whole.float(), scored.inputs.rows)
        return RowBudgets(whole.int())

    def most(self, layer: BudgetLayer, inputs: SelectionInputs) -> int:
        """The number."""
        return self.most_of_one(layer, 0, inputs.rule.width(inputs.rows))

    def most_of_one(self, layer: BudgetLayer, num_blocks: int, width: int) -> int:
        """The number."""
        return min(self.count, width)

    def next_row(
        self,
        layer: BudgetLayer,
        memory: Memory,
        row: NewestRow,
        candidates: Candidates,
        scores: Tensor,
        complexity: Tensor | None,
        blocks: int,
    ) -> Tensor:
        """The number, or all candidates."""
        forced, limit = candidates.counts()
        return torch.minimum(forced + self.count, limit).expand(scores.shape[:3])


class ThresholdBudget(Budget):
    """``budget="threshold"``: every block whose share of the softmaxed scores reaches a threshold.

    A calibration finds the thresholds by length. Rows keep a floor in any case
    (``threshold_floor``), and some blocks by their peaks (``peak_share``).
    """

    calibrated = True

    def rows(self, layer: BudgetLayer, scored: Scored) -> RowBudgets:
        """Counts what reaches the threshold."""
        threshold = row_thresholds(layer, scored.inputs)
        whole = _count_above(scored.scores, scored.candidates, threshold)
        least = threshold_floor(layer, scored.inputs)
        if least is not None:
            whole = torch.maximum(whole, least)
        layer.record_density(whole, scored.inputs.rows)
        return RowBudgets(whole)

    def lists(self, layer: BudgetLayer, scored: Scored) -> BlockPattern | None:
        """One kernel keeps what reaches the threshold, for which nothing must be ranked."""
        if not scored.kernels:
            return None
        inputs = scored.inputs
        counts, indices = threshold_lists(
            scored.scores.detach(), inputs.intervals, row_thresholds(layer, inputs),
            threshold_floor(layer, inputs), scored.kept,
        )  # fmt: skip
        layer.record_density(counts, inputs.rows)
        return inputs.listed_pattern(counts, indices)

    def most(self, layer: BudgetLayer, inputs: SelectionInputs) -> int:
        """All candidates."""
        return inputs.rule.width(inputs.rows)

    def most_of_one(self, layer: BudgetLayer, num_blocks: int, width: int) -> int:
        """All candidates."""
        return width

    def next_row(
        self,
        layer: BudgetLayer,
        memory: Memory,
        row: NewestRow,
        candidates: Candidates,
        scores: Tensor,
        complexity: Tensor | None,
        blocks: int,
    ) -> Tensor:
        """Counts what reaches the threshold of the newest length."""
        by_score = _count_above(scores, candidates, newest_thresholds(layer, memory, row))
        least = newest_floor(layer, row, blocks, candidates.width)
        return by_score if least is None else torch.maximum(by_score, least)


def budget_of(budget: str, num_selected_blocks: int | None = None) -> Budget:
    """The budget that settings name."""
    if budget == "threshold":
        return ThresholdBudget()
    if num_selected_blocks is not None:
        return CountBudget(num_selected_blocks)
    return ContentBudget() if budget == "adaptive" else ShareBudget()


def lower(exact: Tensor, forced: Tensor, even: Tensor | None) -> Tensor:
    """What rows get in any case: the share ``even`` of what lies above their forced blocks."""
    exact = exact.detach()
    return exact if even is None else forced + even * (exact - forced)


def score_bound(layer: BudgetLayer, seen: Tensor) -> Tensor:
    """The most scored blocks that scores can win rows that count as seeing so many."""
    return most_by_score(1 - layer.base_sparsity, seen, MOST_FACTOR)


def content_factor(layer: BudgetLayer, held: HeldBudget, complexity: Tensor) -> Tensor:
    """Each row's factor on the odds of being read, ``(b, pattern heads, i)``, by its content.

    Args:
        layer: Whose gain and offset.
        held: Its numbers in force.
        complexity: ``(b, num_kv_heads, i)``, from :func:`content_complexity`.
    """
    heads = layer.pattern_heads
    if heads == 1:
        complexity = complexity.mean(1, keepdim=True)
    elif heads != layer.num_kv_heads:
        complexity = complexity.repeat_interleave(heads // layer.num_kv_heads, 1)
    gain, offset = layer.budget_terms(held)
    factor = offset[:, None] + gain[:, None] * complexity
    return factor.clamp(LEAST_FACTOR, MOST_FACTOR)


def rule_of(layer: BudgetLayer, blocks: int) -> CandidateRule:
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


def room(layer: BudgetLayer, rows: RowRange, blocks: int) -> tuple[Tensor, Tensor]:
    """Forced blocks of every row of a causal pass, and forced and candidate ones together."""
    if layer.segment_lengths is None:
        # The sinks and the neighbours of the diagonal overlap in the first rows.
        limit = rows.num_allowed.long()
        return limit.clamp(max=layer.num_sink_blocks + layer.num_local_blocks + 1), limit
    return rule_of(layer, blocks).build(rows).counts()


def _count_above(scores: Tensor, candidates: Candidates, threshold: float | Tensor) -> Tensor:
    """Blocks per row ``(b, h, i)``, forced ones included."""
    if isinstance(threshold, Tensor):
        threshold = threshold[..., None]
    count = threshold_budget(scores, candidates.scored, candidates.forced, threshold)
    return candidates.forced.sum(-1, dtype=torch.int32) + count


def threshold_floor(layer: BudgetLayer, inputs: SelectionInputs) -> Tensor | None:
    """What every row keeps at least with thresholds, forced blocks included.

    Returns:
        int32 ``(1 or b, 1 or heads, i)``; None without a floor.
    """
    share, sparsity = layer.threshold_floor, 1 - layer.densest
    if not share:
        return None
    rule, rows = inputs.rule, inputs.rows

    def compute() -> Tensor:
        candidates = inputs.candidates
        return floor_budget(share, sparsity, *candidates.counts(), rows, candidates.width)

    # It follows from lengths and the rule alone, so layers of a model share it.
    return rows.remember((rule, "floor", share, sparsity), compute)


def newest_floor(layer: BudgetLayer, row: NewestRow, blocks: int, width: int) -> Tensor | None:
    """What the newest row of each sample keeps at least, by all rows so far.

    int32 ``(1 or b, heads, 1)``.
    """
    if not layer.threshold_floor:
        return None
    share, sparsity, rule = layer.threshold_floor, 1 - layer.densest, rule_of(layer, blocks)

    def compute() -> Tensor:
        rows = row.so_far(blocks)
        least = floor_budget(share, sparsity, *room(layer, rows, blocks), rows, width)
        return row.newest(least, layer.pattern_heads).int()

    return row.rows.remember((rule, "newest floor", share, sparsity, width), compute)


def row_lengths(layer: BudgetLayer, inputs: SelectionInputs) -> int | Tensor:
    """The key tokens by which a row's threshold is looked up.

    Those of its sample (:func:`sample_lengths`), up to a multiple of ``length_step``: between two
    sampled queries of ``scorer="low_rank"`` nothing else of a row's choice changes. Or, with
    ``query_scope="past"`` and causal, those that the row's first token sees, ``(1 or b, 1, i)``.
    """
    mask, size = inputs.mask, layer.block_size
    if not layer.looks_back(mask):
        return _rounded(layer, sample_lengths(inputs, size))

    def count() -> Tensor:
        return _span_lengths(mask, size, inputs.query.device)

    return inputs.rows.remember(("row lengths", size), count)


def sample_lengths(inputs: SelectionInputs, block_size: int) -> int | Tensor:
    """The key tokens of each row's sample or document, as if it were alone.

    Padding does not count, nor does room of a cache behind the newest query.

    Args:
        inputs: What a layer chooses by.
        block_size: Tokens per block of queries.

    Returns:
        One number if it holds for all, otherwise ``(1 or b, 1, i)``; at least 1.
    """
    mask = inputs.mask
    if not mask.per_sample:
        seen = mask.q_len + int(mask.query_offset) if mask.causal else mask.kv_len
        return max(min(mask.kv_len, seen), 1)
    whole = dataclasses.replace(mask, causal=False)
    found = _span_lengths(whole, block_size, inputs.query.device)
    if not mask.causal or mask.document_ids is not None:
        return found
    return torch.minimum(found, (mask.q_len + mask.offset_column()) + torch.zeros_like(found))


def _rounded(layer: BudgetLayer, lengths: _Lengths) -> _Lengths:
    """Lengths up to the next multiple of ``length_step``."""
    return cast(_Lengths, -(-lengths // layer.length_step) * layer.length_step)


def _span_lengths(mask: AttentionMask, block_size: int, device: torch.device) -> Tensor:
    """Keys that the first query of each block sees, ``(1 or b, 1, i)``, at least 1."""
    spans = mask.spans(torch.arange(0, mask.q_len, block_size, device=device))
    return (spans[:, 1:] - spans[:, :1]).clamp(min=1)


def row_thresholds(layer: BudgetLayer, inputs: SelectionInputs) -> float | Tensor:
    """The thresholds for :func:`row_lengths`: one number, or ``(1 or b, 1, 1 or i)``."""
    table, lengths = layer.threshold_table(), row_lengths(layer, inputs)
    if table is None:
        # The host cannot read it.
        rows = layer.threshold_rows()
        if not isinstance(lengths, Tensor):
            lengths = torch.full((1, 1, 1), lengths, dtype=torch.long, device=rows.device)
        return thresholds_at(rows, lengths)
    if not isinstance(lengths, Tensor):
        return table.at(lengths)
    by_row = lengths
    return inputs.rows.remember(
        ("row thresholds", layer.block_size, layer.past, layer.length_step, table),
        lambda: thresholds_at(layer.threshold_rows(), by_row),
    )


def newest_thresholds(layer: BudgetLayer, memory: Memory, row: NewestRow) -> float | Tensor:
    """The row's threshold in each sample, ``(b, 1, 1)``, or one number for all."""
    # With "past" those that the row's first token sees, whichever token chooses.
    size, table = layer.block_size, layer.threshold_table()
    known = (row.tokens,) if row.tokens is not None else row.lengths
    if known is not None and table is not None:
        found = [
            table.at(max(n - 1, 0) // size * size + 1 if layer.past else _rounded(layer, n))
            for n in known
        ]
        if row.tokens is not None:
            return found[0]
        return layer.thresholds.new_tensor(found).view(-1, 1, 1)
    first = row.number * size + 1
    lengths = first if layer.past else _rounded(layer, memory.lengths)
    return thresholds_at(layer.threshold_rows(), lengths.view(-1, 1, 1))


def threshold_sample(layer: BudgetLayer, scored: Scored) -> ThresholdSample:
    """What a calibration of ``budget="threshold"`` needs of scores."""
    inputs = scored.inputs
    candidates, lengths = scored.candidates, row_lengths(layer, inputs)
    share = lengths.float() / inputs.mask.kv_len if isinstance(lengths, Tensor) else None
    return ThresholdSample.of(
        scored.scores, candidates.scored, candidates.forced, inputs.rows.num_allowed,
        threshold_floor(layer, inputs), share=share,
    )  # fmt: skip
