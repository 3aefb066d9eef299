"""Decoding: the next tokens over the blocks that they choose in a cache."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_attention_pytorch.nn.decoding.choice import choose as choose_blocks
from dilated_attention_pytorch.nn.decoding.prompt import allocate
from dilated_attention_pytorch.nn.decoding.settings import check_layer, sums_mass
from dilated_attention_pytorch.nn.decoding.token_scores import CachedKeys
from dilated_attention_pytorch.nn.selector_state import SelectorState
from dilated_attention_pytorch.ops.block_sparse_decode.arguments import check_arguments
from dilated_attention_pytorch.ops.block_sparse_decode.interface import BACKENDS, run_decode
from dilated_attention_pytorch.runtime import check_floating

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive

# So few tokens of samples of different lengths choose one by one, to wait for nothing.
MANY = 16


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
    if selector_key is not None and layer.config.scorer == "low_rank":
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
            choose_blocks(layer, state, CachedKeys.of(layer, state, key_cache))
        outs.append(_attend(layer, query[:, part], key_cache, value_cache, state))
        first += count
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _attend(
    layer: BlockSparseAdaptive, query: Tensor, key: Tensor, value: Tensor, state: SelectorState
) -> Tensor:
    """Attention of the newest tokens by the state's lists."""
    memory = state.filled()
    width = memory.indices.shape[2]
    if query.device.type == "cpu":
        # Lists have room for the most that a row may read; there it would all be gathered.
        width = int(memory.counts.max())
    arguments = check_arguments(
        query, key, value, memory.counts[:, :, None], memory.indices[:, :, None, :width],
        lengths=state.lengths, starts=state.starts, block_size=layer.block_size, scale=layer.scale,
        block_bias=memory.bias[:, :, None, :width] if memory.bias.shape[2] else None,
    )  # fmt: skip
    backend = layer.backend if layer.backend in BACKENDS else "auto"
    return run_decode(arguments, backend)[0]


def _chooses(layer: BlockSparseAdaptive, state: SelectorState, token: int) -> bool:
    """Whether a token that every sample has at the same place needs another list."""
    if not (state.uniform and state.listed):
        return True
    if layer.config.query_scope == "past":
        return token % layer.block_size == 0
    if not (sums_mass(layer) and layer.config.budget != "adaptive"):
        return True
    # Nothing that low-rank scores go by has come between two sampled queries of a block.
    known = token - token % layer.block_size >= state.known_from
    return not known or token % layer.config.query_stride == 0


def _shared_choices(layer: BlockSparseAdaptive, state: SelectorState, new: int) -> list[int]:
    """How many of the next tokens share a choice, and of those after them, and so on."""
    if layer.config.query_scope != "past" or (new <= MANY and not state.uniform):
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
