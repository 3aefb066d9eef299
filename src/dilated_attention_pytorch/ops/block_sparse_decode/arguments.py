"""Checks what callers hand to the decode op and brings it into the form that backends take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import (
    check_lengths,
    check_qkv,
    check_scale,
    readable,
)
from dilated_attention_pytorch.pattern import check_list_values
from dilated_attention_pytorch.runtime import check_floating


@dataclass(frozen=True, eq=False)
class DecodeArguments:
    """Checked arguments of one call.

    Attributes:
        query: ``(b, n, h, d)``.
        key: ``(b, m, g, d)``; ``g`` divides ``h``.
        value: ``(b, m, g, d)``.
        counts: ``(b, p, n)`` int32, or ``(b, p, 1)`` for all; ``p`` is 1, ``g`` or ``h``.
        indices: ``(b, p, n, k)`` int32, or ``(b, p, 1, k)``.
        lengths: ``(b,)`` integers.
        starts: ``(b,)`` integers or None.
        block_bias: Shaped like ``indices`` or None, in float32 (float64 for float64 inputs).
        block_size: Tokens per block.
        scale: Factor of the logits.
        wants_lse: Whether the caller reads it; if not, it may be empty.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    counts: Tensor
    indices: Tensor
    lengths: Tensor
    starts: Tensor | None
    block_bias: Tensor | None
    block_size: int
    scale: float
    wants_lse: bool = True

    def limits(self) -> Tensor:
        """Tokens that each query sees, ``(b, n)`` int64: its own position + 1, at least 0."""
        n, limit = self.query.shape[1], self.lengths.long()[:, None]
        if n > 1:
            limit = limit + torch.arange(1 - n, 1, device=self.query.device)
        limit = limit.clamp(0, self.key.shape[1])
        if self.starts is None:
            return limit
        return torch.minimum(limit, (self.key.shape[1] - self.starts.long())[:, None])

    def listed(self) -> Tensor:
        """Booleans shaped like ``indices``: the entries that are read.

        Not those from the count on, nor numbers of no block, nor blocks with a bias of -inf.
        """
        slots = torch.arange(self.indices.shape[-1], device=self.indices.device)
        listed = (slots < self.counts[..., None]) & (self.indices >= 0)
        listed = listed & (self.indices < ceil_div(self.key.shape[1], self.block_size))
        if self.block_bias is not None:
            listed = listed & (self.block_bias != -torch.inf)
        return listed


def check_arguments(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, kv_num_blocks: Tensor,
    kv_indices: Tensor, *, lengths: Tensor | None, starts: Tensor | None, block_size: int,
    scale: float | None, block_bias: Tensor | None,
) -> DecodeArguments:  # fmt: skip
    """Validates and normalises; see ``block_sparse_decode`` for the meaning of each."""
    check_qkv(query, key_cache, value_cache, cached=True)
    batch, new, num_heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key_cache, value_cache)):
        raise ValueError(
            "block_sparse_decode has no gradient: call it under torch.no_grad(), or use "
            "block_sparse_attention to train."
        )
    _check_lists(kv_num_blocks, kv_indices, batch, new, num_heads, kv_heads, query.device)
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}.")
    if lengths is None:
        lengths = torch.full((batch,), key_cache.shape[1], dtype=torch.long, device=query.device)
    check_lengths("lengths", lengths, (batch,), query.device)
    if starts is not None:
        check_lengths("starts", starts, (batch,), query.device)
    scale = check_scale(scale, head_dim)
    if block_bias is not None:
        check_floating("block_bias", block_bias)
        if block_bias.shape != kv_indices.shape:
            raise ValueError(
                f"block_bias must be shaped like kv_indices {tuple(kv_indices.shape)}, got "
                f"{tuple(block_bias.shape)}."
            )
    return arrange(
        query, key_cache, value_cache, kv_num_blocks, kv_indices, lengths=lengths, starts=starts,
        block_size=block_size, scale=scale, block_bias=block_bias,
    )  # fmt: skip


def arrange(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, kv_num_blocks: Tensor,
    kv_indices: Tensor, *, lengths: Tensor, starts: Tensor | None, block_size: int, scale: float,
    block_bias: Tensor | None, wants_lse: bool = True,
) -> DecodeArguments:  # fmt: skip
    """:func:`check_arguments` of what was checked before."""
    if block_bias is not None:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        block_bias = block_bias.to(wide)
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key_cache, value_cache = (x.to(dtype) for x in (query, key_cache, value_cache))
    return DecodeArguments(
        query, key_cache, value_cache, kv_num_blocks, kv_indices, lengths, starts, block_bias,
        block_size, scale, wants_lse,
    )  # fmt: skip


def _check_lists(
    counts: Tensor, indices: Tensor, batch: int, new: int, num_heads: int, kv_heads: int,
    device: torch.device,
) -> None:  # fmt: skip
    for name, x in (("kv_num_blocks", counts), ("kv_indices", indices)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}.")
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {x.dtype}; call .int() on it.")
        if x.device != device:
            raise ValueError(f"{name} must be on {device} like query, got {x.device}.")
    heads = indices.shape[1] if indices.dim() == 4 else 0
    fits = counts.shape == indices.shape[:3] and indices.shape[0] == batch
    if not fits or indices.shape[2] not in (1, new) or heads not in (1, kv_heads, num_heads):
        raise ValueError(
            f"kv_num_blocks must be (batch, heads, n) and kv_indices (batch, heads, n, k) with "
            f"batch={batch}, n={new} (or 1) and 1, {kv_heads} or {num_heads} heads, got "
            f"{tuple(counts.shape)} and {tuple(indices.shape)}."
        )


def check_values(args: DecodeArguments) -> None:
    """Checks lists, lengths and starts by value where that waits for no device.

    Raises:
        ValueError: Naming the first rule that is broken.
    """
    if not readable(args.indices):
        return
    capacity = args.key.shape[1]
    check_list_values(args.counts, args.indices, ceil_div(capacity, args.block_size))
    for name, x in (("lengths", args.lengths), ("starts", args.starts)):
        if x is not None and bool(((x < 0) | (x > capacity)).any()):
            raise ValueError(
                f"{name} must lie in [0, {capacity}] (the tokens of key_cache), got {x.tolist()}."
            )
