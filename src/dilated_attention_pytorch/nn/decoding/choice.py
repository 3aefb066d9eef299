"""Lists the blocks that the newest tokens read, by the summaries in a state."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.nn.decoding.budgets import newest_thresholds, row_budget
from dilated_attention_pytorch.nn.decoding.codes import compare, key_codes, query_codes
from dilated_attention_pytorch.nn.decoding.newest_row import NewestRow, rule_of
from dilated_attention_pytorch.nn.decoding.settings import (
    has_bias,
    keeps_summaries,
    list_width,
    most_scored,
)
from dilated_attention_pytorch.nn.decoding.token_scores import CachedKeys, has_kernel, token_scores
from dilated_attention_pytorch.nn.estimators import slot_bias
from dilated_attention_pytorch.nn.selector_state import Memory, SelectorState
from dilated_attention_pytorch.ops.block_selection.interface import threshold_lists
from dilated_attention_pytorch.pattern import pack_ascending
from dilated_attention_pytorch.selection.top_k import choose_top_k

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


def choose(layer: BlockSparseAdaptive, state: SelectorState, cached: CachedKeys | None) -> None:
    """Lists the blocks that the newest token of each sample reads."""
    size, memory = layer.block_size, state.filled()
    # With room fixed beforehand all shapes stay the same: a CUDA graph can replay them.
    needed = ceil_div(max(state.num_tokens, 1), size)
    state.grow(needed, list_width(layer, needed))
    blocks = state.num_blocks if state.max_tokens is not None else needed
    (_compiled_list_blocks() if state.compile else list_blocks)(layer, memory, blocks, cached)
    state.listed = True


@cache
def _compiled_list_blocks() -> Callable[
    [BlockSparseAdaptive, Memory, int, CachedKeys | None], None
]:
    # On first use: the compiler is slow to import.
    return torch.compile(list_blocks, fullgraph=True, dynamic=False)


def list_blocks(
    layer: BlockSparseAdaptive, memory: Memory, blocks: int, cached: CachedKeys | None
) -> None:
    """Chooses among ``blocks`` blocks for the newest token of each sample: lists in ``memory``.

    ``cached``: the keys, for scorers that read them.
    """
    row, rule, complexity = NewestRow.of(layer, memory), rule_of(layer, blocks), None
    if keeps_summaries(layer):
        complexity = _summarise(layer, memory, row)
    if cached is not None and _lists_at_once(layer, cached, blocks):
        scores = token_scores(layer, memory, row, None, cached, blocks)
        threshold = newest_thresholds(layer, memory, row)
        counts, indices = threshold_lists(scores, rule.intervals(row.rows), threshold)
        memory.counts.copy_(counts[..., 0])
        memory.indices[..., :blocks].copy_(indices[:, :, 0])
        return
    candidates = rule.build(row.rows)
    if cached is not None:
        scores = token_scores(layer, memory, row, candidates.indices, cached, blocks)
    else:
        asked = query_codes(layer, *_asking(layer, memory, row))
        codes = memory.codes[:, :, 1 : blocks + 1]
        scores = compare(layer, asked, codes, candidates.indices)
    budget = row_budget(layer, memory, row, candidates, scores, complexity, blocks)
    scored, forced = candidates.scored, candidates.forced
    count = (budget - forced.sum(-1)).clamp(min=0)
    width = candidates.width
    chosen = choose_top_k(scores, scored, count, most_scored(layer, blocks, width))
    everything = chosen | forced
    slots = pack_ascending(everything, memory.indices.shape[2]).long()
    numbers = slots
    if candidates.indices is not None:
        numbers = candidates.indices.expand(scores.shape).gather(-1, slots)
    memory.counts.copy_(everything.sum(-1)[..., 0])
    memory.indices.copy_(numbers[:, :, 0])
    if has_bias(layer):
        used = torch.arange(slots.shape[-1], device=slots.device) < memory.counts[..., None, None]
        kept = scored.expand(scores.shape).gather(-1, slots) & used
        memory.bias.copy_(slot_bias(layer, scores, scored, slots, kept)[:, :, 0])


def _lists_at_once(layer: BlockSparseAdaptive, cached: CachedKeys, blocks: int) -> bool:
    """Whether the kernel that keeps what reaches a threshold can make the lists."""
    config = layer.config
    if config.budget != "threshold" or config.threshold_floor or has_bias(layer):
        return False
    if layer.segment_lengths is not None:
        return False
    return has_kernel(layer, cached.key, blocks)


def _asking(layer: BlockSparseAdaptive, memory: Memory, row: NewestRow) -> tuple[Tensor, Tensor]:
    """The queries that the row is judged by, and which of them are real."""
    size, past = layer.block_size, layer.config.query_scope == "past"
    first = row.first
    start = first - (size - 1) if past else first
    # Where the queries up to the row's first token are gone, those that follow stand in.
    start = torch.where(memory.known > first, memory.known, start)
    query, real = memory.window("queries", start, size)
    return query, real & row.asks(start, size, memory.known) if past else real


def _summarise(layer: BlockSparseAdaptive, memory: Memory, row: NewestRow) -> Tensor | None:
    """Summarises the block before the row and what the row may see of its own.

    Returns:
        The row's complexity ``(b, g, 1)``, for an adaptive budget.
    """
    size = layer.block_size
    tokens, valid = memory.window("keys", (row.number - 1) * size, 2 * size)
    if layer.config.query_scope == "past":
        # Whichever token of the row chooses sees what its first one does.
        valid[:, size + 1 :] = False
    codes, means = key_codes(layer, tokens, valid)
    for step in (-1, 0):
        row.put(memory.codes, step, codes[:, :, step + 1 : step + 2])
    if layer.config.budget != "adaptive":
        return None
    units = unit_means(means)
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
    return torch.where(others > 0, (1 - likeness).clamp(0, 1), 1.0)


def unit_means(means: Tensor) -> Tensor:
    """Unit-norm means ``(b, g, j, d)`` float32, as :func:`content_complexity` takes them."""
    unit = F.normalize(means.detach().float().transpose(1, 2), dim=-1)
    return unit.nan_to_num(0.0, 0.0, 0.0)
