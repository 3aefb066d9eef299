"""Scores of pairs of blocks that need no training; all but the oracle are cheap estimates."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.scoring.summaries import block_summaries
from dilated_attention_pytorch.scoring.tile_mass import tile_mass

# Bounds of one chunk of query tokens: 2**24 float32 numbers are 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


def mean_pool_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    scale: float,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Dot product of the blocks' means, as MoBA (arXiv 2502.13189) gates.

    Differs from the paper: one choice per block of queries instead of per query.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``.
        block_size: Tokens per block.
        scale: Factor of the logits.
        query_valid: ``(1 or batch, q_len)`` booleans or None: tokens that are not padding.
        key_valid: The same for keys.

    Returns:
        ``(batch, num_heads, i, j)`` float32.
    """
    means = ("mean",)
    q = block_summaries(query, block_size, pooling=means, valid=query_valid).float()
    k = block_summaries(key, block_size, pooling=means, valid=key_valid).float()
    return _products(q * scale, k)


def min_max_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    scale: float,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    r"""An upper bound of a tile's logits from the keys' ranges, as Quest (arXiv 2406.10774).

    :math:`\max_n \sum_d \max(q_{nd} k^{\max}_{jd}, q_{nd} k^{\min}_{jd})` over the queries n of a
    block. Differs from the paper: one choice per block of queries, by their largest bound.

    Args and Returns: as :func:`mean_pool_scores`.
    """
    highest = block_summaries(key, block_size, pooling=("max",), valid=key_valid).float()
    lowest = block_summaries(key, block_size, pooling=("min",), valid=key_valid).float()
    batch, q_len, heads, _ = query.shape
    blocks = ceil_div(q_len, block_size)
    if query_valid is None:
        query_valid = torch.ones(1, q_len, dtype=torch.bool, device=query.device)
    pad = blocks * block_size - q_len
    query, query_valid = F.pad(query, (0, 0, 0, 0, 0, pad)), F.pad(query_valid, (0, pad))
    step = max(_CHUNK_ELEMENTS // max(batch * heads * highest.shape[1] * block_size, 1), 1)
    out = []
    for tokens, valid in zip(
        query.split(step * block_size, 1), query_valid.split(step * block_size, 1), strict=True
    ):
        x = tokens.float() * scale
        bound = _products(x.clamp(min=0), highest) + _products(x.clamp(max=0), lowest)
        bound = bound.masked_fill(~valid[:, None, :, None], torch.finfo(bound.dtype).min)
        out.append(bound.unflatten(2, (-1, block_size)).amax(3))
    return torch.cat(out, 2)


def antidiagonal_scores(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    *,
    block_size: int,
    scale: float,
    stride: int = 8,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Tile mass estimated from antidiagonals, as XAttention (arXiv 2503.16428).

    Every square of ``stride`` queries and keys is represented by the mean of the logits on its
    antidiagonal, which crosses every row and column; the softmax runs over the squares. The work
    is 1 / stride of dense attention's logits.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``.
        mask: Which keys a query sees.
        block_size: Tokens per block.
        scale: Factor of the logits.
        stride: Side of a square; must divide ``block_size``.
        query_valid: ``(1 or batch, q_len)`` booleans or None: tokens that are not padding.
        key_valid: The same for keys.

    Returns:
        The logarithm of the estimated mass, ``(batch, num_heads, i, j)`` float32.

    Raises:
        ValueError: If ``stride`` does not divide ``block_size``.
    """
    if block_size % stride:
        raise ValueError(f"stride must divide block_size={block_size}, got {stride}.")
    q = _strided(query, stride, query_valid)
    k = _strided(key, stride, key_valid).unflatten(-1, (stride, -1)).flip(-2).flatten(-2)
    squares = _squares(mask, stride)
    weights = None
    if query_valid is not None:
        # Padding comes last in a block, so a square is all padding if its first token is.
        weights = query_valid[:, None, ::stride].float()
    mass = tile_mass(
        q, k, squares, block_size=block_size // stride, scale=scale / stride, row_weights=weights
    )
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def _strided(x: Tensor, stride: int, valid: Tensor | None) -> Tensor:
    """Puts ``stride`` tokens side by side: ``(b, n / stride, heads, stride * dim)``."""
    if valid is not None:
        x = torch.where(valid[..., None, None], x, 0)
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % stride))
    return x.unflatten(1, (-1, stride)).transpose(2, 3).flatten(3)


def _squares(mask: AttentionMask, stride: int) -> AttentionMask:
    """The token rule for squares: seen if any of its tokens may be."""

    def up(x: int | Tensor) -> int | Tensor:
        return (x + stride - 1) // stride

    ids = mask.document_ids
    lengths = mask.key_lengths
    return replace(
        mask,
        q_len=ceil_div(mask.q_len, stride),
        kv_len=ceil_div(mask.kv_len, stride),
        query_offset=up(mask.query_offset),
        key_lengths=None if lengths is None else (lengths + stride - 1) // stride,
        # Documents start at block boundaries here, and stride divides the blocks.
        document_ids=None if ids is None else ids[:, ::stride],
    )


def _products(q: Tensor, k: Tensor) -> Tensor:
    """``(b, i, h, d)`` with ``(b, j, g, d)`` to ``(b, h, i, j)``; g divides h."""
    batch, rows, heads, dim = q.shape
    groups = k.shape[2]
    q = q.transpose(1, 2).reshape(batch, groups, heads // groups * rows, dim)
    return (q @ k.permute(0, 2, 3, 1)).view(batch, heads, rows, k.shape[1])
