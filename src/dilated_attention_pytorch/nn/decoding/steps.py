"""Decoding: the next tokens over the blocks that they choose in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.nn.decoding.choice import choose as choose_blocks
from dilated_attention_pytorch.nn.decoding.prompt import allocate
from dilated_attention_pytorch.nn.decoding.settings import check_mode
from dilated_attention_pytorch.nn.selector_state import SelectorState
from dilated_attention_pytorch.ops.block_sparse_decode.arguments import check_arguments
from dilated_attention_pytorch.ops.block_sparse_decode.interface import BACKENDS, run_decode

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


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
    check_mode(layer)
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
        allocate(layer, state, score_query, key_cache, new)
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
            choose_blocks(layer, state)
        memory = state.filled()
        # The next choice overwrites the lists.
        counts.append(memory.counts[:, :, None].expand(-1, -1, count))
        indices.append(memory.indices[:, :, None].expand(-1, -1, count, -1))
        biases.append(memory.bias[:, :, None].expand(-1, -1, count, -1))
        if first + count < new:
            counts[-1], indices[-1], biases[-1] = (x[-1].clone() for x in (counts, indices, biases))
        first += count
    bias = _joined(biases) if state.filled().bias.shape[2] else None
    arguments = check_arguments(
        query, key_cache, value_cache, _joined(counts), _joined(indices), lengths=state.lengths,
        starts=state.starts, block_size=layer.block_size, scale=layer.scale, block_bias=bias,
    )  # fmt: skip
    backend = layer.backend if layer.backend in BACKENDS else "auto"
    return run_decode(arguments, backend)[0]


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
