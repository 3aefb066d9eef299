"""The attention function that adapted models call."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dilated_attention_pytorch.integrations.transformers.cached_attention import cached_attention
from dilated_attention_pytorch.integrations.transformers.followed_cache import CacheHandle
from dilated_attention_pytorch.integrations.transformers.mask import (
    OFFSET,
    PACKED,
    PLAIN,
    check_compact,
    token_mask,
)
from dilated_attention_pytorch.integrations.transformers.padding import CompactTokens
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer

# Name of the submodule that makes an attention layer sparse.
SELECTOR = "block_selector"
# Name of the argument by which such a layer's pre-hook hands over the cache.
CACHE = "block_selector_cache"


def block_sparse_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; transformers calls it.

    Layers without a selector (dense layers, sliding windows) run PyTorch's attention.

    Args:
        module: The model's attention layer; its selector decides which blocks are read.
        query: ``(batch, num_heads, q_len, head_dim)``, after rotary positions.
        key: ``(batch, num_kv_heads, kv_len, head_dim)``, with what the cache holds.
        value: Shaped like ``key``.
        attention_mask: From :func:`compact_mask`.
        scaling: Factor of the logits.
        dropout: Must be 0.
        **others: What models hand to any attention function.

    Returns:
        ``(batch, q_len, num_heads, head_dim)``, and None in the place of the weights, which are
        never formed.

    Raises:
        ValueError: If a mask of single pairs, dropout or the attention weights are asked for.
    """
    selector: BlockSparseLayer | None = module._modules.get(SELECTOR)  # type: ignore[assignment]
    handle: CacheHandle | None = others.pop(CACHE, None)
    cached_keys = key
    # Under autocast rotary positions leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if selector is None:
        if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int32:
            attention_mask = token_mask(attention_mask, query.shape[2], key.shape[2])
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return out
    if dropout:
        raise ValueError(
            f"attention_dropout must be 0, got {dropout}: block-sparse attention never forms the "
            "weights that it would drop."
        )
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False: block-sparse attention never forms the weights."
        )
    if scaling is not None and selector.scale is not None and scaling != selector.scale:
        raise ValueError(
            f"scaling must be {selector.scale}, which the selector was made for, got {scaling}."
        )
    mask = check_compact(attention_mask, query.shape[0], key.shape[2])
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    call = None
    if handle is not None:
        whole = partial(_sparse, selector)
        call = cached_attention(handle, query, key, value, mask, cached_keys, whole)
    if call is None:
        return _sparse(selector, query, key, value, mask), None
    return call.attend(), None


def _sparse(
    selector: BlockSparseLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> Tensor:
    """Calls the layer in ``(batch, seq_len, num_heads, head_dim)`` with what the mask says."""
    kind, q_len, kv_len = mask.shape[2], query.shape[1], key.shape[1]
    if kind == PLAIN:
        return _tensor(selector(query, key, value, is_causal=True))
    if kind == PACKED:
        return _tensor(selector(query, key, value, is_causal=True, cu_seqlens=mask[:, 0, 0]))
    offset = mask[:, 0, -1, 0]
    if kind == OFFSET:
        # What a static cache holds beyond the last query was not written yet.
        lengths = (offset + q_len).clamp(max=kv_len)
        out = selector(query, key, value, is_causal=True, query_offset=offset, key_lengths=lengths)
        return _tensor(out)
    tokens = CompactTokens.of(mask[:, 0, 0].bool(), offset, q_len)
    query, key, value = tokens.compact(query, key, value)
    # Without a cache queries and keys are one sequence and need no offset.
    place = None if q_len == kv_len else tokens.query_offset
    out = selector(
        query, key, value, is_causal=True, query_offset=place, key_lengths=tokens.key_lengths,
        query_lengths=tokens.query_lengths,
    )  # fmt: skip
    return tokens.spread(_tensor(out))


def _tensor(out: Any) -> Tensor:
    tensor: Tensor = out
    return tensor
