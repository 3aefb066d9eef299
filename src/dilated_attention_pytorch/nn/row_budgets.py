"""How many blocks the rows of an adaptive layer may read, and the most that any can get."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import Candidates, RowRange
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.block_sparse import SelectionInputs
from dilated_attention_pytorch.nn.held_budget import HeldBudget, MarginEvidence
from dilated_attention_pytorch.runtime import recording, tracing
from dilated_attention_pytorch.selection.bounds import (
    most_scored_blocks,
    most_visible_blocks,
    most_visible_share,
)
from dilated_attention_pytorch.selection.budget import (
    LEAST_FACTOR,
    MOST_FACTOR,
    content_complexity,
    round_budget,
    share_by_content,
    water_level_budget,
)
from dilated_attention_pytorch.selection.running_budget import running_budget
from dilated_attention_pytorch.selection.score_budget import blocks_above, most_by_score
from dilated_attention_pytorch.selection.threshold import (
    ThresholdTable,
    floor_budget,
    threshold_budget,
    thresholds_at,
)

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
    from dilated_attention_pytorch.nn.budget_layer import BudgetLayer
    from dilated_attention_pytorch.nn.scoring_layer import ScoringLayer

_Lengths = TypeVar("_Lengths", bound=int | Tensor)


@dataclasses.dataclass(eq=False)
class DensityRecord:
    """What the last forward pass left for :meth:`BlockSparseAdaptive.get_sparsity_loss`."""

    budget: Tensor | None = None
    allowed: Tensor | None = None
    sparsity: Tensor | None = None

    def excess(self) -> Tensor:
        """Share of the visible tiles that the budgets take, over the target, less 1: 0-dim."""
        if self.budget is None or self.allowed is None or self.sparsity is None:
            raise RuntimeError("get_sparsity_loss needs a forward pass first; call the layer.")
        total = self.allowed.expand(self.budget.shape).sum().clamp(min=1)
        return self.budget.sum() / total / (1 - self.sparsity) - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> DensityRecord:
        # A tensor inside an autograd graph cannot be copied, and a copy has run no forward pass.
        return DensityRecord()

    def __reduce__(self) -> tuple[type[DensityRecord], tuple[()]]:
        return DensityRecord, ()


@dataclasses.dataclass(frozen=True, eq=False)
class RowBudgets:
    """How many blocks rows may read.

    Attributes:
        whole: Forced blocks included, int32 ``(b, h, i)``.
        keep: ``1 - base_sparsity``, 0-dim; None where budgets do not go by it.
        by_score: Booleans: rows that the scores gave more than their even share; None where
            scores have no part.
        held: What is to follow from this pass for the next one; None: nothing.
        exact: Real-valued shares, with ``held``.
        allowed: Visible blocks per row, with ``held``.
    """

    whole: Tensor
    keep: Tensor | None = None
    by_score: Tensor | None = None
    held: HeldBudget | None = None
    exact: Tensor | None = None
    allowed: Tensor | None = None

    def evidence(self, layer: BlockSparseAdaptive, forced: Tensor) -> MarginEvidence | None:
        """What a backward pass is to measure, of ``forced`` blocks per row; None: nothing."""
        if self.keep is None or not layer.training:
            return None
        count = (self.whole - forced).clamp(min=0)
        return MarginEvidence(layer.budget_state, count, self.by_score, self.keep)

    def hand_on(self) -> None:
        """Leaves what this pass measured for the next one, after the mass probe is made.

        Written before, the buffer could not change again until a compiled backward pass ran.
        """
        held, exact, allowed, keep = self.held, self.exact, self.allowed, self.keep
        if held is None or exact is None or allowed is None or keep is None:
            return
        held.follow(exact, self.whole, allowed, keep)


def row_budgets(
    layer: BlockSparseAdaptive, inputs: SelectionInputs, scores: Tensor, key_means: Tensor
) -> RowBudgets:
    """Blocks per row; records the density."""
    config, rows, candidates = layer.config, inputs.rows, inputs.candidates
    shape, width = scores.shape[:3], inputs.rule.width(rows)
    forced = candidates.forced.sum(-1)
    limit = forced + candidates.scored.sum(-1)
    if config.hierarchy:
        # The budget depends on lengths alone, not on which super-blocks were kept.
        limit = rows.num_allowed.long()
    if config.budget == "threshold":
        rounded = budget_by_score(scores, candidates, row_thresholds(layer, inputs))
        least = threshold_floor(inputs, config.threshold_floor, 1 - layer.densest)
        if least is not None:
            rounded = torch.maximum(rounded, least)
        layer.record_density(rounded, rows)
        return RowBudgets(rounded)
    if config.num_selected_blocks is not None:
        exact = torch.minimum(forced + config.num_selected_blocks, limit).float()
        exact = exact.expand(shape)
        layer.record_density(exact, rows)
        return RowBudgets(round_budget(exact, rows))
    keep = (1 - layer.base_sparsity).expand(shape)
    held = None if layer.keeps_all else layer.held_budget(inputs.mark)
    if held is not None:
        factor = budget_factor(layer, held, rows, key_means, inputs.mask.causal)
        keep = share_by_content(keep, factor)
    even = None if held is None else held.even
    if layer.looks_back(inputs.mask):
        exact, rounded = running_budget(keep, forced, limit, rows, even)
    else:
        exact = water_level_budget(keep, forced, limit, rows, width)
        rounded = round_budget(lower(exact, forced, even), rows)
    layer.record_density(exact, rows)
    if held is None or not held.scores_decide:
        return RowBudgets(rounded, held_keep(layer))
    count = blocks_above(
        scores, candidates.scored, held.threshold, score_bound(layer, rows),
        heads_compete=candidates.indices is None,
    )  # fmt: skip
    return by_larger(layer, held, exact, rounded, forced + count, rows)


def lower(exact: Tensor, forced: Tensor, even: Tensor | None) -> Tensor:
    """What rows get in any case: the share ``even`` of what lies above their forced blocks."""
    exact = exact.detach()
    return exact if even is None else forced + even * (exact - forced)


def score_bound(layer: BlockSparseAdaptive, rows: RowRange) -> Tensor:
    """The most scored blocks that scores can win each row."""
    keep = 1 - layer.base_sparsity
    return most_by_score(keep, rows.num_allowed, MOST_FACTOR)


def by_larger(
    layer: BlockSparseAdaptive,
    held: HeldBudget,
    exact: Tensor,
    even: Tensor,
    by_score: Tensor,
    rows: RowRange,
) -> RowBudgets:
    """Each row's even share or what its scores win it, and what the layer learns of both.

    Args:
        layer: The layer.
        held: Its numbers in force.
        exact: Real-valued shares ``(b, h, i)``.
        even: Integer ones, lowered.
        by_score: Blocks by score, forced ones included.
        rows: Visible ranges.
    """
    whole = torch.maximum(even, by_score.to(even.dtype))
    keep = held_keep(layer)
    return RowBudgets(whole, keep, by_score > even, held, exact, rows.num_allowed)


def held_keep(layer: BlockSparseAdaptive) -> Tensor:
    """``1 - base_sparsity`` as it is now, for a backward pass that may come after a change."""
    return 1 - layer.base_sparsity.detach()


def budget_by_score(scores: Tensor, candidates: Candidates, threshold: float | Tensor) -> Tensor:
    """Blocks per row ``(b, h, i)`` with thresholds as from :func:`row_thresholds`."""
    if isinstance(threshold, Tensor):
        threshold = threshold[..., None]
    count = threshold_budget(scores, candidates.scored, candidates.forced, threshold)
    return candidates.forced.sum(-1, dtype=torch.int32) + count


def threshold_floor(inputs: SelectionInputs, share: float, sparsity: float) -> Tensor | None:
    """What every row keeps at least with ``budget="threshold"``, forced blocks included.

    Args:
        inputs: What a layer chooses by.
        share: ``threshold_floor`` of its settings.
        sparsity: Mean sparsity to meet, on the host.

    Returns:
        int32 ``(1 or b, 1 or heads, i)``; None without a floor.
    """
    if not share:
        return None
    rule, rows = inputs.rule, inputs.rows

    def compute() -> Tensor:
        candidates = inputs.candidates
        forced = candidates.forced.sum(-1)
        limit = forced + candidates.scored.sum(-1)
        return floor_budget(share, sparsity, forced, limit, rows, candidates.width)

    # It follows from lengths and the rule alone, so layers of a model share it.
    return rows.remember((rule, "floor", share, sparsity), compute)


def row_lengths(layer: ScoringLayer, inputs: SelectionInputs) -> int | Tensor:
    """The key tokens by which a row's threshold is looked up.

    Those of its sample (:func:`sample_lengths`, :func:`whole_samples`); or, with
    ``query_scope="past"`` and causal, those that the row's first token sees, ``(1 or b, 1, i)``.
    """
    mask, size = inputs.mask, layer.block_size
    if not layer.looks_back(mask):
        return whole_samples(layer, sample_lengths(inputs, size))

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


def _span_lengths(mask: AttentionMask, block_size: int, device: torch.device) -> Tensor:
    """Keys that the first query of each block sees, ``(1 or b, 1, i)``, at least 1."""
    spans = mask.spans(torch.arange(0, mask.q_len, block_size, device=device))
    return (spans[:, 1:] - spans[:, :1]).clamp(min=1)


def whole_samples(layer: ScoringLayer, lengths: _Lengths) -> _Lengths:
    """Lengths up to where the next query is sampled, for ``scorer="low_rank"``.

    Between two sampled queries nothing of a row's choice changes but the threshold, by the
    ``query_stride`` tokens at most; so that changes with the next one too.
    """
    if layer.config.scorer != "low_rank":
        return lengths
    stride = layer.config.query_stride
    return cast(_Lengths, -(-lengths // stride) * stride)


def row_thresholds(layer: BlockSparseAdaptive, inputs: SelectionInputs) -> float | Tensor:
    """The thresholds of ``budget="threshold"`` for :func:`row_lengths`.

    Returns:
        One number, or ``(1 or b, 1, 1 or i)``.
    """
    table, lengths = layer.threshold_table(), row_lengths(layer, inputs)
    if table is None:
        return unread_thresholds(layer, lengths)
    if not isinstance(lengths, Tensor):
        return thresholds_for(table, lengths, layer.thresholds.device)
    return inputs.rows.remember(
        ("row thresholds", layer.block_size, table),
        lambda: thresholds_at(layer.threshold_rows(), lengths),
    )


def unread_thresholds(layer: BudgetLayer, lengths: int | Tensor) -> Tensor:
    """Thresholds at lengths, ``(1 or b, 1, 1 or i)``, where the host cannot read the table."""
    rows = layer.threshold_rows()
    if not isinstance(lengths, Tensor):
        lengths = torch.full((1, 1, 1), lengths, dtype=torch.long, device=rows.device)
    return thresholds_at(rows, lengths)


def thresholds_for(
    table: ThresholdTable, lengths: int | Tensor, device: torch.device
) -> float | Tensor:
    """The thresholds of a table at one length, or at those of rows.

    The numbers reach a device once per table and length: a copy would wait for all work before.

    Args:
        table: By length.
        lengths: One number, or ``(1 or b, 1, i)``.
        device: Where the thresholds are needed.

    Returns:
        A number if it holds for all, otherwise ``(1 or b, 1, i)``.
    """
    if not isinstance(lengths, Tensor):
        return table.at(lengths)
    # A CUDA graph may take what an earlier pass has brought to the device, but bring nothing.
    symbolic = tracing() and not recording()
    known = (_on_device if symbolic else _kept)(table.rows(), device)
    return thresholds_at(known, lengths)


def _on_device(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, device=device, dtype=torch.float64)


_kept = lru_cache(maxsize=1024)(_on_device)


def budget_factor(
    layer: BlockSparseAdaptive,
    held: HeldBudget,
    rows: RowRange,
    key_means: Tensor,
    causal: bool,
) -> Tensor:
    """Each row's share of the base budget, ``(b, pattern heads, i)``, by its content.

    Args:
        layer: The layer.
        held: Its numbers in force.
        rows: Visible ranges.
        key_means: From :meth:`BlockSparseAdaptive.pool_keys`.
        causal: Whether later keys are hidden.
    """
    past = layer.config.query_scope == "past" and causal
    return factor_of(layer, held, content_complexity(key_means, rows, past_only=past))


def factor_of(layer: BlockSparseAdaptive, held: HeldBudget, complexity: Tensor) -> Tensor:
    """The share for a complexity ``(b, num_kv_heads, i)``; see :func:`budget_factor`."""
    heads = layer.pattern_heads
    if heads == 1:
        complexity = complexity.mean(1, keepdim=True)
    elif heads != layer.num_kv_heads:
        complexity = complexity.repeat_interleave(heads // layer.num_kv_heads, 1)
    gain, offset = layer.budget_terms(held)
    factor = offset[:, None] + gain[:, None] * complexity
    return factor.clamp(LEAST_FACTOR, MOST_FACTOR)


def scored_bound(layer: BlockSparseAdaptive, inputs: SelectionInputs, count: Tensor) -> int:
    """An upper bound of ``count``; on a GPU from the lengths alone, to wait for nothing."""
    if count.device.type == "cpu" and not torch.compiler.is_compiling():
        return int(count.max()) if count.numel() else 0
    return most_scored(layer, inputs)


def most_scored(layer: BlockSparseAdaptive, inputs: SelectionInputs) -> int:
    """The most scored blocks that any row can get, from the lengths alone."""
    config, width = layer.config, inputs.rule.width(inputs.rows)
    if layer.looks_back(inputs.mask):
        return most_scored_of(layer, -(-inputs.mask.kv_len // layer.block_size), width)
    if config.num_selected_blocks is not None:
        return min(config.num_selected_blocks, width)
    if inputs.mask.per_sample or config.budget == "threshold":
        return width
    # Scores can win a row a share of what it sees, whatever the level over all rows is.
    by_score = 0
    if config.budget == "adaptive":
        by_score = most_scored_of(layer, -(-inputs.mask.kv_len // layer.block_size), width)
        if layer.segment_lengths is None:
            # No level is above the share of the row that sees most.
            return by_score
    mask, compiling = inputs.mask, torch.compiler.is_compiling()
    keep = most_kept(layer)
    if layer.segment_lengths is None:
        offset = mask.query_offset
        # An int: with one offset per sample the width was returned above.
        most = most_visible_blocks(
            mask.q_len, mask.kv_len, mask.causal, cast(int, offset), layer.block_size, keep
        )
        return min(width, most)
    if compiling:
        # Counting the lattice takes tensors, whose values would be symbols. Candidates of
        # segments do not grow with the length, so this stays small.
        return width
    by_level = most_scored_blocks(
        mask.q_len,
        mask.kv_len,
        mask.causal,
        int(mask.query_offset),
        inputs.rows.has_diagonal,
        layer.block_size,
        layer.segment_lengths,
        layer.dilation_rates,
        layer.pattern_heads,
        config.num_local_blocks,
        config.num_sink_blocks,
        keep,
    )
    return min(width, max(by_level, by_score))


def most_scored_of(layer: BlockSparseAdaptive, num_blocks: int, width: int) -> int:
    """An upper bound of the scored blocks of a row that sees ``num_blocks``, by lengths alone.

    For a row whose budget is a share of what it sees; ``width`` candidates are the most.
    """
    config = layer.config
    if config.num_selected_blocks is not None:
        return min(config.num_selected_blocks, width)
    if config.budget == "threshold":
        return width
    return min(width, most_visible_share(num_blocks, most_kept(layer)))


def most_kept(layer: BlockSparseAdaptive) -> float:
    """The largest share of its visible blocks that a row can get.

    While compiling a power of two, which schedules seldom move.
    """
    if torch.compiler.is_compiling():
        # With dynamic shapes the compiler takes numbers of modules, and of globals, for symbols,
        # and no size can be made of a power of one: so it counts from MOST_FACTOR or 1.
        share, left = 2.0 if layer.config.budget == "adaptive" else 1.0, layer.halvings
        while left > 0:
            share, left = share * 0.5, left - 1
        return min(share, 1.0)
    factor, share = MOST_FACTOR if layer.config.budget == "adaptive" else 1.0, layer.densest
    return min(share * factor, 1.0)
