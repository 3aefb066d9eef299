"""Decoding: a state is filled with a prompt, and the next tokens choose blocks of a cache by it.

Everything that a choice needs is recomputed from the state alone, so that choosing twice for a row
gives the same list: samples of different lengths choose together, whoever begins a block or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import row_ranges
from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.nn.budgets import newest_floor, newest_thresholds, rule_of
from dilated_attention_pytorch.nn.scorings import (
    has_token_kernel,
    kept_by_peak,
    kept_by_peak_with_kernels,
    list_newest_row,
)
from dilated_attention_pytorch.nn.select import slot_bias
from dilated_attention_pytorch.nn.selector import CachedKeys, SelectorLayer
from dilated_attention_pytorch.nn.state import RING_BLOCKS, Memory, NewestRow, SelectorState
from dilated_attention_pytorch.ops.block_selection.interface import threshold_lists
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import (
    check_lengths,
    check_scale,
    make_mask,
)
from dilated_attention_pytorch.ops.block_sparse_decode.arguments import arrange
from dilated_attention_pytorch.ops.block_sparse_decode.interface import BACKENDS, run_decode
from dilated_attention_pytorch.pattern import pack_ascending
from dilated_attention_pytorch.runtime import check_floating
from dilated_attention_pytorch.selection.budget import unit_means
from dilated_attention_pytorch.selection.top_k import choose_top_k, first_of_all

# So few tokens of samples of different lengths choose one by one, to wait for nothing.
MANY = 16


def decoding_unsupported_reason(layer: SelectorLayer) -> str | None:
    """The setting for which no summaries can be kept, or None if the layer can decode."""
    return "hierarchy" if layer.config.hierarchy else None


def check_layer(layer: SelectorLayer) -> None:
    """Refuses settings of which a state keeps nothing, and training mode."""
    reason = decoding_unsupported_reason(layer)
    if reason is not None:
        raise ValueError(
            f"decoding with a SelectorState does not know {reason}; call the layer with "
            "query_offset over the whole cache instead, or configure it without."
        )
    if layer.training:
        raise RuntimeError("decoding needs evaluation mode; call layer.eval() first.")


def has_bias(layer: SelectorLayer) -> bool:
    """Whether kept blocks carry a logit bias."""
    return layer.config.estimator == "gumbel" and not layer.config.hard_sparsity


def most_scored(layer: SelectorLayer, blocks: int, width: int) -> int:
    """An upper bound of the blocks that a row of ``width`` candidates chooses by score."""
    if layer.segment_lengths is not None and layer.budget.by_share and not layer.past:
        # A level over rows with few candidates can exceed a row's own share.
        return width
    return layer.budget.most_of_one(layer, blocks, width)


def list_width(layer: SelectorLayer, blocks: int) -> int:
    """An upper bound of the blocks that a row reads, from lengths alone."""
    forced = layer.num_sink_blocks + layer.num_local_blocks + 1
    return min(blocks, most_scored(layer, blocks, blocks) + forced)


def remember(
    layer: SelectorLayer,
    query: Tensor,
    key: Tensor,
    state: SelectorState,
    *,
    key_lengths: Tensor | None,
    starts: Tensor | None,
    query_offset: Tensor | None,
) -> None:
    """See :meth:`BlockSparseAdaptive.remember`."""
    check_layer(layer)
    layer.check_inputs(query, key, key)
    _check_prompt(query, key, state, query_offset)
    batch, length = key.shape[:2]
    for name, x in (("starts", starts), ("query_offset", query_offset)):
        if x is not None:
            check_lengths(name, x, (batch,), key.device)
    mask = make_mask(batch, length, length, device=key.device, causal=True, key_lengths=key_lengths)
    valid = None
    if key_lengths is not None:
        valid = torch.arange(length, device=key.device) < key_lengths[:, None]
    allocate(layer, state, query, key, length)
    memory, blocks = state.filled(), ceil_div(length, layer.block_size)
    _note_known_queries(memory, query_offset)
    known_from = 0 if query_offset is None else length - query.shape[1]
    state.restart(starts, length, known_from, uniform=key_lengths is None)
    memory.lengths.fill_(length)
    if key_lengths is not None:
        memory.lengths.copy_(key_lengths)
    _fill_rings(memory, query, key, query_offset)
    size = (layer.block_size, layer.block_size)
    rows = row_ranges(mask, size, has_diagonal=True, device=key.device)
    means = None
    if layer.keeps_summaries:
        encoded, means = layer.scoring.encode(layer, key, valid)
        memory.encoded_keys[:, :, 1 : blocks + 1] = encoded
    layer.budget.remember(layer, memory, rows, means, blocks)


def _check_prompt(
    query: Tensor, key: Tensor, state: SelectorState, query_offset: Tensor | None
) -> None:
    if query_offset is not None:
        return
    if state.num_tokens:
        raise ValueError(
            f"state must be empty, but holds {state.num_tokens} tokens; use decode for the tokens "
            "that follow, say with query_offset which of the tokens the queries are, or reset it."
        )
    if key.shape[1] != query.shape[1]:
        raise ValueError(
            f"query and key must be the same prompt, got {query.shape[1]} and {key.shape[1]} "
            "tokens; with fewer queries say by query_offset which tokens they are."
        )


def _note_known_queries(memory: Memory, query_offset: Tensor | None) -> None:
    """Sets from which token on queries are known, before the memory is filled."""
    if query_offset is None:
        memory.known.zero_()
        return
    first = query_offset.to(memory.known)
    # Queries that follow those of the ring extend them.
    torch.where(memory.lengths == first, memory.known, first, out=memory.known)


def _fill_rings(memory: Memory, query: Tensor, key: Tensor, query_offset: Tensor | None) -> None:
    ring = memory.queries.shape[1]
    token = memory.lengths[:, None] - ring + torch.arange(ring, device=key.device)
    _put_latest(memory.keys, key, token, token)
    place = token if query_offset is None else token - query_offset.long()[:, None]
    _put_latest(memory.queries, query, token, place)


def _put_latest(ring: Tensor, x: Tensor, token: Tensor, place: Tensor) -> None:
    """Puts tokens ``(b, ring)``, which stand at ``place`` of x, into a ring; others stay."""
    shape = (-1, -1, *x.shape[2:])
    slots = (token % ring.shape[1])[..., None, None].expand(shape)
    latest = x.gather(1, place.clamp(0, x.shape[1] - 1)[..., None, None].expand(shape))
    ring.scatter_(1, slots, torch.where(place[..., None, None] < 0, ring.gather(1, slots), latest))


def allocate(
    layer: SelectorLayer, state: SelectorState, query: Tensor, key: Tensor, length: int
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
    if layer.budget.calibrated:
        # Refuses a layer without thresholds.
        layer.threshold_table()
    sample, _ = layer.scoring.encode(layer, key[:1, :1], None)
    complexity, past = layer.budget.by_content, layer.past
    width = list_width(layer, blocks)
    bias = width if has_bias(layer) else 0

    def table(heads: int, *rest: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, heads, blocks + 1, *rest, device=query.device, dtype=dtype)

    def counter() -> Tensor:
        return torch.zeros(batch, dtype=torch.int64, device=query.device)

    state.memory = Memory(
        lengths=counter(),
        known=counter(),
        queries=query.new_zeros(batch, RING_BLOCKS * size, *query.shape[2:]),
        keys=key.new_zeros(batch, RING_BLOCKS * size, *key.shape[2:]),
        encoded_keys=table(sample.shape[1], sample.shape[3], dtype=sample.dtype),
        unit_sums=table(
            layer.num_kv_heads if complexity else 0, layer.head_dim, dtype=torch.float32
        ),
        factors=table(heads if complexity and not past else 0, dtype=torch.float32),
        earned=table(heads, dtype=torch.int64),
        given=table(heads, dtype=torch.int64),
        masses=table(heads if layer.sums_mass else 0, dtype=sample.dtype),
        peaks=table(
            heads if layer.sums_mass and layer.config.peak_share else 0, dtype=sample.dtype
        ),
        sampled=torch.zeros(batch, heads, device=query.device, dtype=torch.int64),
        counts=torch.zeros(batch, heads, dtype=torch.int32, device=query.device),
        indices=torch.zeros(batch, heads, width, dtype=torch.int32, device=query.device),
        bias=torch.zeros(batch, heads, bias, dtype=torch.float32, device=query.device),
    )


def decode(
    layer: SelectorLayer,
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
    check_layer(layer)
    layer.check_inputs(query, key_cache, value_cache, cached=True)
    for name, x in (("selector_query", selector_query), ("selector_key", selector_key)):
        if x is not None:
            check_floating(name, x)
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
    if selector_key is not None and not layer.scoring.by_summaries:
        raise ValueError(
            "selector_key must be None with scorer='low_rank', which reads the keys of key_cache."
        )
    score_query = query if selector_query is None else selector_query
    if state.memory is None:
        allocate(layer, state, score_query, key_cache, new)
    _check_new(state, score_query, selector_key, query)
    outs, first = [], 0
    for count in _shared_choices(layer, state, new):
        part = slice(first, first + count)
        if selector_key is None:
            state.append(score_query[:, part], key_cache, cached=True)
        else:
            state.append(score_query[:, part], selector_key[:, part], cached=False)
        # The first of the tokens that share a choice.
        if _chooses(layer, state, state.num_tokens - count) if choose is None else choose:
            choose_blocks(layer, state, key_cache)
        outs.append(_attend(layer, query[:, part], key_cache, value_cache, state))
        first += count
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _attend(
    layer: SelectorLayer, query: Tensor, key: Tensor, value: Tensor, state: SelectorState
) -> Tensor:
    """Attention of the newest tokens by the state's lists."""
    memory = state.filled()
    arguments = arrange(
        query, key, value, memory.counts[:, :, None], memory.indices[:, :, None],
        lengths=state.lengths, starts=state.starts, block_size=layer.block_size,
        scale=check_scale(layer.scale, layer.head_dim),
        block_bias=memory.bias[:, :, None] if memory.bias.shape[2] else None,
        wants_lse=False,
    )  # fmt: skip
    backend = layer.backend if layer.backend in BACKENDS else "auto"
    return run_decode(arguments, backend)[0]


def _chooses(layer: SelectorLayer, state: SelectorState, token: int) -> bool:
    """Whether a token that every sample has at the same place needs another list."""
    if not (state.uniform and state.listed):
        return True
    if layer.past:
        return token % layer.block_size == 0
    if not (layer.sums_mass and not layer.budget.by_content):
        return True
    # Nothing that low-rank scores go by has come between two sampled queries of a block.
    known = token - token % layer.block_size >= state.known_from
    return not known or token % layer.config.query_stride == 0


def _shared_choices(layer: SelectorLayer, state: SelectorState, new: int) -> list[int]:
    """How many of the next tokens share a choice, and of those after them, and so on."""
    if not layer.past or (new <= MANY and not state.uniform):
        return [1] * new
    # Of samples of other lengths others begin blocks; reading which waits for the device.
    lengths = [state.num_tokens] if state.uniform else state.lengths.tolist()
    size = layer.block_size
    begun = {length % size for length in lengths}
    cuts = [n for n in range(1, new) if any((n + b) % size == 0 for b in begun)]
    return [end - start for start, end in itertools.pairwise([0, *cuts, new])]


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


def choose_blocks(layer: SelectorLayer, state: SelectorState, key_cache: Tensor) -> None:
    """Lists the blocks that the newest token of each sample reads."""
    cached = None if layer.scoring.by_summaries else CachedKeys(layer, state, key_cache)
    size, memory = layer.block_size, state.filled()
    # With room fixed beforehand all shapes stay the same: a CUDA graph can replay them.
    needed = ceil_div(max(state.num_tokens, 1), size)
    state.grow(needed, list_width(layer, needed))
    blocks = state.num_blocks if state.max_tokens is not None else needed
    tokens = state.num_tokens if state.known_length else None
    list_all = _compiled_list_blocks() if state.compile else list_blocks
    list_all(layer, memory, blocks, cached, tokens)
    state.listed = True


@cache
def _compiled_list_blocks() -> Callable[..., None]:
    # On first use: the compiler is slow to import.
    return torch.compile(list_blocks, fullgraph=True, dynamic=False)


def list_blocks(
    layer: SelectorLayer,
    memory: Memory,
    blocks: int,
    cached: CachedKeys | None,
    tokens: int | None = None,
) -> None:
    """Chooses among ``blocks`` blocks for the newest token of each sample: lists in ``memory``.

    ``cached``: the keys, for scorers that read them. ``tokens``: of every sample, if known.
    """
    row, rule = NewestRow.of(memory, layer.block_size, tokens), rule_of(layer, blocks)
    complexity = None
    if layer.keeps_summaries:
        complexity = _summarise(layer, memory, row)
    if cached is not None and _lists_by_threshold(layer):
        if list_newest_row(layer, memory, row, cached, blocks):
            return
        if has_token_kernel(layer, cached.key, blocks):
            scores, *peaks = layer.scoring.newest(layer, memory, row, None, cached, blocks)
            intervals = rule.intervals(row.rows)
            counts, indices = threshold_lists(
                scores, intervals, newest_thresholds(layer, memory, row),
                newest_floor(layer, row, blocks, blocks),
                kept_by_peak_with_kernels(layer, peaks, intervals),
            )  # fmt: skip
            memory.counts.copy_(counts[..., 0])
            memory.indices[..., :blocks].copy_(indices[:, :, 0])
            return
    # The layers of a model share them.
    candidates = row.rows.remember(rule, lambda: rule.build(row.rows))
    scores, *peaks = layer.scoring.newest(layer, memory, row, candidates.indices, cached, blocks)
    kept = kept_by_peak(layer, peaks, candidates, row.rows.num_allowed)
    budget = layer.budget.next_row(
        layer, memory, row, candidates.keeping(kept), scores, complexity, blocks
    )
    scored, forced = candidates.scored, candidates.forced
    count = (budget - forced.sum(-1)).clamp(min=0)
    width = candidates.width
    most = most_scored(layer, blocks, width)
    chosen = choose_top_k(first_of_all(scores, kept), scored, count, most)
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


def _lists_by_threshold(layer: SelectorLayer) -> bool:
    """Whether kernels that keep what reaches a threshold can make the lists."""
    return layer.budget.calibrated and not has_bias(layer) and layer.segment_lengths is None


def _summarise(layer: SelectorLayer, memory: Memory, row: NewestRow) -> Tensor | None:
    """Summarises the block before the row and what the row may see of its own.

    Returns:
        The row's complexity ``(b, g, 1)``, for an adaptive budget.
    """
    size = layer.block_size
    tokens, valid, _ = memory.window("keys", (row.number - 1) * size, 2 * size)
    if layer.past:
        # Whichever token of the row chooses sees what its first one does.
        valid[:, size + 1 :] = False
    encoded, means = layer.scoring.encode(layer, tokens, valid)
    for step in (-1, 0):
        row.put(memory.encoded_keys, step, encoded[:, :, step + 1 : step + 2])
    if not layer.budget.by_content:
        return None
    units = unit_means(means)
    before, own = units[:, :, :1], units[:, :, 1:]
    until = row.at(memory.unit_sums, -2) + before
    row.put(memory.unit_sums, -1, until)
    row.put(memory.unit_sums, 0, until + own)
    if layer.past:
        mine, total, others = before, until, row.number - 1
    else:
        mine, total, others = own, until + own, row.number
    others = others.view(-1, 1, 1)
    likeness = (mine * (total - mine)).sum(-1) / others.clamp(min=1)
    return torch.where(others > 0, (1 - likeness).clamp(0, 1), 1.0)
