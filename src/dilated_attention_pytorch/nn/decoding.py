"""Prefill and decode of :class:`BlockSparseAdaptive`: choosing blocks by remembered summaries.

Everything that a choice needs is recomputed from the state alone, so that choosing twice for a row
gives the same list: samples of different lengths choose together, whoever begins a block or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.candidates import (
    Candidates,
    RowRange,
    build_candidates,
    row_ranges,
)
from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.nn.estimators import slot_bias
from dilated_attention_pytorch.nn.row_budgets import (
    budget_by_score,
    budget_factor,
    factor_of,
    most_scored_of,
)
from dilated_attention_pytorch.nn.selector_state import RING_BLOCKS, Memory, SelectorState
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import make_mask
from dilated_attention_pytorch.ops.block_sparse_decode import block_sparse_decode
from dilated_attention_pytorch.pattern import pack_ascending
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer
from dilated_attention_pytorch.selection.budget import round_budget, water_level_budget
from dilated_attention_pytorch.selection.running_budget import (
    next_budget,
    running_budget,
    share_units,
)
from dilated_attention_pytorch.selection.top_k import choose_top_k

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


def prefill(
    layer: BlockSparseAdaptive,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: SelectorState,
    *,
    key_lengths: Tensor | None,
    starts: Tensor | None,
    selector_query: Tensor | None,
    selector_key: Tensor | None,
) -> Tensor:
    """See :meth:`BlockSparseAdaptive.prefill`."""
    remember(
        layer,
        query if selector_query is None else selector_query,
        key if selector_key is None else selector_key,
        state,
        key_lengths=key_lengths,
        starts=starts,
    )
    out = layer(
        query, key, value, is_causal=True, key_lengths=key_lengths,
        selector_query=selector_query, selector_key=selector_key,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def remember(
    layer: BlockSparseAdaptive,
    query: Tensor,
    key: Tensor,
    state: SelectorState,
    *,
    key_lengths: Tensor | None,
    starts: Tensor | None,
) -> None:
    """See :meth:`BlockSparseAdaptive.remember`."""
    _check_mode(layer)
    layer.check_inputs(query, key, key)
    batch, length = query.shape[:2]
    if state.num_tokens:
        raise ValueError(
            f"state must be empty, but holds {state.num_tokens} tokens; use decode for the tokens "
            "that follow, or reset it."
        )
    if key.shape[1] != length:
        raise ValueError(
            f"query and key must be the same prompt, got {length} and {key.shape[1]} tokens."
        )
    mask = make_mask(
        batch, length, length, device=query.device, causal=True, key_lengths=key_lengths
    )
    valid = None
    if key_lengths is not None:
        valid = torch.arange(length, device=key.device) < key_lengths[:, None]
    _allocate(layer, state, query, key, length)
    memory, blocks = state.filled(), ceil_div(length, layer.block_size)
    state.starts, state.uniform, state.listed = starts, key_lengths is None, False
    state.count(length)
    memory.lengths.fill_(length)
    if key_lengths is not None:
        memory.lengths.copy_(key_lengths)
    _fill_rings(memory, query, key)
    keys, means = layer.pool_keys(key, valid)
    memory.codes[:, :, 1 : blocks + 1] = _scorer(layer).encode_keys(keys)
    size = (layer.block_size, layer.block_size)
    rows = row_ranges(mask, size, has_diagonal=True, device=query.device)
    keep = (1 - layer.base_sparsity).expand(1, layer.pattern_heads, blocks)
    if layer.config.budget == "adaptive":
        memory.unit_sums[:, :, 1 : blocks + 1] = _units(means).cumsum(2)
        factor = budget_factor(layer, rows, means, causal=True)
        if layer.config.query_scope == "block":
            memory.factors[:, :, 1 : blocks + 1] = factor
        keep = (keep * factor).clamp(max=1)
    if _runs_a_budget(layer):
        forced, limit = _room(layer, rows, blocks)
        units = share_units(keep, rows.num_allowed, limit)
        memory.earned[:, :, 1 : blocks + 1] = units.cumsum(-1)
        _, budget = running_budget(keep, forced, limit, rows)
        memory.given[:, :, 1 : blocks + 1] = budget.cumsum(-1)


def _scorer(layer: BlockSparseAdaptive) -> ImportanceScorer:
    """The scorer, which must judge blocks by summaries that a state can keep."""
    config = layer.config
    refused = {
        "scorer='prototypes'": config.scorer == "prototypes",
        "budget='threshold'": config.budget == "threshold",
        "sample_stride": config.sample_stride is not None,
        "hierarchy": bool(config.hierarchy),
    }
    for name, asked in refused.items():
        if asked:
            raise ValueError(
                f"decoding with a SelectorState does not know {name}; call the layer with "
                "query_offset over the whole cache instead, or configure it without."
            )
    return cast(ImportanceScorer, layer.scorer)


def _runs_a_budget(layer: BlockSparseAdaptive) -> bool:
    """Whether a row's budget depends on those of the rows before it."""
    config = layer.config
    by_share = config.budget in ("adaptive", "fixed") and config.num_selected_blocks is None
    return by_share and config.query_scope == "past"


def _room(layer: BlockSparseAdaptive, rows: RowRange, blocks: int) -> tuple[Tensor, Tensor]:
    """Forced blocks of every row, and forced and candidate ones together."""
    if layer.segment_lengths is None:
        # The sinks and the neighbours of the diagonal overlap in the first rows.
        limit = rows.num_allowed.long()
        return limit.clamp(max=layer.num_sink_blocks + layer.num_local_blocks + 1), limit
    candidates = _candidates(layer, rows, blocks)
    forced = candidates.forced.sum(-1)
    return forced, forced + candidates.scored.sum(-1)


def decode(
    layer: BlockSparseAdaptive,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    state: SelectorState,
    *,
    selector_query: Tensor | None,
    selector_key: Tensor | None,
    choose: bool | None,
) -> Tensor:
    """See :meth:`BlockSparseAdaptive.decode`."""
    _check_mode(layer)
    layer.check_inputs(query, key_cache, value_cache)
    new = query.shape[1]
    if choose is not None and new != 1:
        raise ValueError(f"choose needs one new token, got {new}; leave it None.")
    if choose is False and not state.listed:
        raise ValueError("choose=False needs a choice to go on with; choose once first.")
    if key_cache.shape[1] < new + (state.num_tokens if state.uniform else 0):
        raise ValueError(
            f"key_cache must hold the {state.num_tokens} tokens so far and the {new} new ones, got "
            f"{key_cache.shape[1]}."
        )
    score_query = query if selector_query is None else selector_query
    if state.memory is None:
        _allocate(layer, state, score_query, key_cache, new)
    _check_new(state, score_query, selector_key, query)
    counts, indices, biases = [], [], []
    first = 0
    while first < new:
        count = _steps(layer, state, new - first)
        part = slice(first, first + count)
        begins = state.num_tokens % layer.block_size == 0
        if selector_key is None:
            state.append(score_query[:, part], key_cache, cached=True)
        else:
            state.append(score_query[:, part], selector_key[:, part], cached=False)
        needed = not (layer.config.query_scope == "past" and state.uniform and state.listed)
        if choose if choose is not None else needed or begins:
            _choose(layer, state)
        memory = state.filled()
        # The next choice overwrites the lists.
        counts.append(memory.counts[:, :, None].expand(-1, -1, count))
        indices.append(memory.indices[:, :, None].expand(-1, -1, count, -1))
        biases.append(memory.bias[:, :, None].expand(-1, -1, count, -1))
        if first + count < new:
            counts[-1], indices[-1], biases[-1] = (x[-1].clone() for x in (counts, indices, biases))
        first += count
    bias = _joined(biases) if state.filled().bias.shape[2] else None
    out = block_sparse_decode(
        query, key_cache, value_cache, _joined(counts), _joined(indices), lengths=state.lengths,
        starts=state.starts, block_size=layer.block_size, scale=layer.scale, block_bias=bias,
        backend=layer.backend if layer.backend in ("reference", "gather", "triton") else "auto",
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _check_mode(layer: BlockSparseAdaptive) -> None:
    if layer.training:
        raise RuntimeError("decoding needs evaluation mode; call layer.eval() first.")


def _check_new(state: SelectorState, query: Tensor, key: Tensor | None, original: Tensor) -> None:
    memory = state.filled()
    if query.shape != original.shape or query.shape[0] != memory.lengths.shape[0]:
        raise ValueError(
            f"the state holds {memory.lengths.shape[0]} samples; query and selector_query must be "
            f"alike, got {tuple(original.shape)} and {tuple(query.shape)}."
        )
    expected = (*query.shape[:2], *memory.keys.shape[2:])
    if key is not None and tuple(key.shape) != expected:
        raise ValueError(
            f"selector_key must hold the new tokens {expected}, got {tuple(key.shape)}."
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """Lists of consecutive tokens, the shorter ones filled up."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].dim() == 4:
        width = max(x.shape[-1] for x in parts)
        parts = [F.pad(x, (0, width - x.shape[-1])) for x in parts]
    return torch.cat(parts, 2)


def _steps(layer: BlockSparseAdaptive, state: SelectorState, left: int) -> int:
    """New tokens that share one choice."""
    if layer.config.query_scope != "past" or not state.uniform:
        return 1
    return min(left, layer.block_size - state.num_tokens % layer.block_size)


def _allocate(
    layer: BlockSparseAdaptive, state: SelectorState, query: Tensor, key: Tensor, length: int
) -> None:
    """Gives an empty state its tensors."""
    size, heads = layer.block_size, layer.pattern_heads
    tokens = state.max_tokens or length
    if length > tokens:
        raise ValueError(
            f"the state has room for max_tokens={tokens}, but gets {length}; make a larger one."
        )
    if state.memory is not None:
        state.grow(ceil_div(length, size), 0)
        if state.lengths.shape[0] != query.shape[0]:
            raise ValueError(
                f"the state was made for {state.lengths.shape[0]} samples, got {query.shape[0]}."
            )
        return
    blocks, batch = ceil_div(tokens, size), query.shape[0]
    sample = _scorer(layer).encode_keys(
        query.new_zeros(1, 1, layer.num_kv_heads, _scorer(layer).summary_dim)
    )
    complexity = layer.config.budget == "adaptive"
    past = layer.config.query_scope == "past"
    width = _width(layer, blocks)
    bias = width if _has_bias(layer) else 0

    def table(heads: int, *rest: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, heads, blocks + 1, *rest, device=query.device, dtype=dtype)

    state.memory = Memory(
        lengths=torch.zeros(batch, dtype=torch.int64, device=query.device),
        queries=query.new_zeros(batch, RING_BLOCKS * size, *query.shape[2:]),
        keys=key.new_zeros(batch, RING_BLOCKS * size, *key.shape[2:]),
        codes=table(sample.shape[1], sample.shape[3], dtype=sample.dtype),
        unit_sums=table(
            layer.num_kv_heads if complexity else 0, layer.head_dim, dtype=torch.float32
        ),
        factors=table(heads if complexity and not past else 0, dtype=torch.float32),
        earned=table(heads, dtype=torch.int64),
        given=table(heads, dtype=torch.int64),
        counts=torch.zeros(batch, heads, dtype=torch.int32, device=query.device),
        indices=torch.zeros(batch, heads, width, dtype=torch.int32, device=query.device),
        bias=torch.zeros(batch, heads, bias, device=query.device),
    )


def _has_bias(layer: BlockSparseAdaptive) -> bool:
    return layer.config.estimator == "gumbel" and not layer.config.hard_sparsity


def _most_scored(layer: BlockSparseAdaptive, blocks: int, width: int) -> int:
    """An upper bound of the blocks that a row of ``width`` candidates chooses by score."""
    if layer.segment_lengths is not None and layer.config.query_scope == "block":
        # A level over rows with few candidates can exceed a row's own share.
        return width
    return most_scored_of(layer, blocks, width)


def _width(layer: BlockSparseAdaptive, blocks: int) -> int:
    """An upper bound of the blocks that a row reads, from lengths alone."""
    forced = layer.num_sink_blocks + layer.num_local_blocks + 1
    return min(blocks, _most_scored(layer, blocks, blocks) + forced)


def _fill_rings(memory: Memory, query: Tensor, key: Tensor) -> None:
    ring = memory.queries.shape[1]
    token = memory.lengths[:, None] - ring + torch.arange(ring, device=query.device)
    for target, x in ((memory.queries, query), (memory.keys, key)):
        shape = (-1, -1, *x.shape[2:])
        # Tokens before the first land where nobody looks: windows ask which tokens exist.
        latest = x.gather(1, token.clamp(min=0)[..., None, None].expand(shape))
        target.scatter_(1, (token % ring)[..., None, None].expand(shape), latest)


def _units(means: Tensor) -> Tensor:
    """Unit-norm means ``(b, g, j, d)`` float32, as :func:`content_complexity` takes them."""
    unit = F.normalize(means.detach().float().transpose(1, 2), dim=-1)
    return unit.nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class _Row:
    """The row (query block) of each sample's newest token.

    Attributes:
        number: ``(b,)`` int64.
        rows: What it sees.
        candidates: What it may choose, ``(b, p, 1, c)``.
    """

    number: Tensor
    rows: RowRange
    candidates: Candidates

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


def _choose(layer: BlockSparseAdaptive, state: SelectorState) -> None:
    """Lists the blocks that the newest token of each sample reads."""
    size, memory = layer.block_size, state.filled()
    # With room fixed beforehand all shapes stay the same: a CUDA graph can replay them.
    needed = ceil_div(max(state.num_tokens, 1), size)
    state.grow(needed, _width(layer, needed))
    blocks = state.num_blocks if state.max_tokens is not None else needed
    (_compiled_list_blocks() if state.compile else _list_blocks)(layer, memory, blocks)
    state.listed = True


@cache
def _compiled_list_blocks() -> Callable[[BlockSparseAdaptive, Memory, int], None]:
    # On first use: the compiler is slow to import.
    return torch.compile(_list_blocks, fullgraph=True, dynamic=False)


def _list_blocks(layer: BlockSparseAdaptive, memory: Memory, blocks: int) -> None:
    """Chooses among ``blocks`` blocks for the newest token of each sample: lists in ``memory``."""
    size = layer.block_size
    row = _row(layer, memory, blocks)
    first = row.number * size
    codes, complexity = _summarise(layer, memory, row)
    past = layer.config.query_scope == "past"
    query, valid = memory.window("queries", first - (size - 1 if past else 0), size)
    asked = _scorer(layer).encode_queries(layer.pool_queries(query, valid))
    scores = _scorer(layer).compare(asked, codes[:, :, 1 : blocks + 1], row.candidates.indices)
    budget = _budget(layer, memory, row, scores, complexity, blocks)
    scored, forced = row.candidates.scored, row.candidates.forced
    count = (budget - forced.sum(-1)).clamp(min=0)
    width = row.candidates.width
    chosen = choose_top_k(scores, scored, count, _most_scored(layer, blocks, width))
    everything = chosen | forced
    slots = pack_ascending(everything, memory.indices.shape[2]).long()
    numbers = slots
    if row.candidates.indices is not None:
        numbers = row.candidates.indices.expand(scores.shape).gather(-1, slots)
    memory.counts.copy_(everything.sum(-1)[..., 0])
    memory.indices.copy_(numbers[:, :, 0])
    if _has_bias(layer):
        used = torch.arange(slots.shape[-1], device=slots.device) < memory.counts[..., None, None]
        kept = scored.expand(scores.shape).gather(-1, slots) & used
        memory.bias.copy_(slot_bias(layer, scores, scored, slots, kept)[:, :, 0])


def _row(layer: BlockSparseAdaptive, memory: Memory, blocks: int) -> _Row:
    number = (memory.lengths - 1).clamp(min=0).div(layer.block_size, rounding_mode="floor")
    own = number.view(-1, 1, 1)
    rows = RowRange(torch.zeros_like(own), own + 1, own, own, True, torch.zeros_like(own))
    candidates = _candidates(layer, rows, blocks)
    return _Row(number, rows, candidates)


def _candidates(layer: BlockSparseAdaptive, rows: RowRange, blocks: int) -> Candidates:
    return build_candidates(
        rows,
        num_heads=layer.pattern_heads,
        num_key_blocks=blocks,
        block_size=layer.block_size,
        causal=True,
        segment_lengths=layer.segment_lengths,
        dilation_rates=layer.dilation_rates,
        num_local_blocks=layer.num_local_blocks,
        num_sink_blocks=layer.num_sink_blocks,
    )


def _summarise(
    layer: BlockSparseAdaptive, memory: Memory, row: _Row
) -> tuple[Tensor, Tensor | None]:
    """Summarises the block before the row and the row's own so far.

    Returns:
        The codes of all blocks, and the row's complexity ``(b, g, 1)`` for an adaptive budget.
    """
    size = layer.block_size
    tokens, valid = memory.window("keys", (row.number - 1) * size, 2 * size)
    keys, means = layer.pool_keys(tokens, valid)
    codes = _scorer(layer).encode_keys(keys)
    for step in (-1, 0):
        row.put(memory.codes, step, codes[:, :, step + 1 : step + 2])
    if layer.config.budget != "adaptive":
        return memory.codes, None
    units = _units(means)
    before, own = units[:, :, :1], units[:, :, 1:]
    until = row.at(memory.unit_sums, -2) + before
    row.put(memory.unit_sums, -1, until)
    row.put(memory.unit_sums, 0, until + own)
    if layer.config.query_scope == "past":
        mine, total, others = before, until, row.number - 1
    else:
        mine, total, others = own, until + own, row.number
    others = others.view(-1, 1, 1)
    likeness = (mine * (total - mine)).sum(-1) / others.clamp(min=1)
    return memory.codes, torch.where(others > 0, (1 - likeness).clamp(0, 1), 1.0)


def _budget(
    layer: BlockSparseAdaptive,
    memory: Memory,
    row: _Row,
    scores: Tensor,
    complexity: Tensor | None,
    blocks: int,
) -> Tensor:
    """Blocks that the row reads, forced ones included, ``(b, p, 1)``."""
    config, candidates = layer.config, row.candidates
    forced = candidates.forced.sum(-1)
    limit = forced + candidates.scored.sum(-1)
    by_score = budget_by_score(layer, scores, candidates, blocks * layer.block_size)
    if by_score is not None:
        return by_score
    if config.num_selected_blocks is not None:
        budget = torch.minimum(forced + config.num_selected_blocks, limit)
        return budget.expand(scores.shape[:3])
    keep = (1 - layer.base_sparsity).expand(scores.shape[:3])
    if complexity is not None:
        factor = factor_of(layer, complexity)
        keep = (keep * factor).clamp(max=1)
        if config.query_scope == "block":
            row.put(memory.factors, 0, factor)
    if config.query_scope == "past":
        earned = row.at(memory.earned, -1) + share_units(keep, row.rows.num_allowed, limit)
        given = row.at(memory.given, -1)
        budget = next_budget(earned, given, forced, limit)
        row.put(memory.earned, 0, earned)
        row.put(memory.given, 0, given + budget)
        return budget
    return _level_budget(layer, memory, row, blocks)


def _level_budget(layer: BlockSparseAdaptive, memory: Memory, row: _Row, blocks: int) -> Tensor:
    """The row's budget in a forward pass over everything so far: a level over all its rows."""
    number = torch.arange(blocks, device=row.number.device).view(1, 1, -1)
    end = torch.where(number <= row.number.view(-1, 1, 1), number + 1, 0)
    rows = RowRange(torch.zeros_like(end), end, number, number, True, torch.zeros_like(end))
    forced, limit = _room(layer, rows, blocks)
    heads = layer.pattern_heads
    keep = (1 - layer.base_sparsity).expand(end.shape[0], heads, blocks)
    if layer.config.budget == "adaptive":
        keep = (keep * memory.factors[:, :, 1 : blocks + 1]).clamp(max=1)
    exact = water_level_budget(keep, forced, limit, rows, row.candidates.width)
    budgets = round_budget(exact, rows)
    return budgets.gather(2, row.number.view(-1, 1, 1).expand(-1, heads, 1)).long()
