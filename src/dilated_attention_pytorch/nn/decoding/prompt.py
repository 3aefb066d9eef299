"""Filling a state from tokens that a cache already holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import row_ranges
from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.nn.decoding.budgets import room
from dilated_attention_pytorch.nn.decoding.choice import unit_means
from dilated_attention_pytorch.nn.decoding.codes import key_codes
from dilated_attention_pytorch.nn.decoding.settings import (
    check_layer,
    has_bias,
    keeps_summaries,
    list_width,
    runs_a_budget,
    sums_mass,
)
from dilated_attention_pytorch.nn.row_budgets import budget_factor
from dilated_attention_pytorch.nn.selector_state import RING_BLOCKS, Memory, SelectorState
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import check_lengths, make_mask
from dilated_attention_pytorch.selection.budget import running_budget, share_by_content, share_units

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


def remember(
    layer: BlockSparseAdaptive,
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
    keep = (1 - layer.base_sparsity).expand(1, layer.pattern_heads, blocks)
    even = None
    if keeps_summaries(layer):
        codes, means = key_codes(layer, key, valid)
        memory.codes[:, :, 1 : blocks + 1] = codes
    held = layer.held_budget()
    if held is not None:
        even = held.even
        memory.unit_sums[:, :, 1 : blocks + 1] = unit_means(means).cumsum(2)
        factor = budget_factor(layer, held, rows, means, causal=True)
        if layer.config.query_scope == "block":
            memory.factors[:, :, 1 : blocks + 1] = factor
        keep = share_by_content(keep, factor)
    if runs_a_budget(layer):
        forced, limit = room(layer, rows, blocks)
        units = share_units(keep, rows.num_allowed, forced, limit, even)
        memory.earned[:, :, 1 : blocks + 1] = units.cumsum(-1)
        _, budget = running_budget(keep, forced, limit, rows, even)
        memory.given[:, :, 1 : blocks + 1] = budget.cumsum(-1)


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
    if layer.config.budget == "threshold":
        # Refuses a layer without thresholds.
        layer.threshold_table()
    sample, _ = key_codes(layer, key[:1, :1], None)
    complexity = layer.config.budget == "adaptive"
    past = layer.config.query_scope == "past"
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
        codes=table(sample.shape[1], sample.shape[3], dtype=sample.dtype),
        unit_sums=table(
            layer.num_kv_heads if complexity else 0, layer.head_dim, dtype=torch.float32
        ),
        factors=table(heads if complexity and not past else 0, dtype=torch.float32),
        earned=table(heads, dtype=torch.int64),
        given=table(heads, dtype=torch.int64),
        masses=table(heads if sums_mass(layer) else 0, dtype=sample.dtype),
        sampled=counter(),
        counts=torch.zeros(batch, heads, dtype=torch.int32, device=query.device),
        indices=torch.zeros(batch, heads, width, dtype=torch.int32, device=query.device),
        bias=torch.zeros(batch, heads, bias, dtype=torch.float32, device=query.device),
    )
