"""Tile mass, the share of a block's attention that each key block gets, and cheap estimates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.scoring.summaries import block_summaries

# Logits of one chunk, by device type; the tokens' square is never stored.
_CHUNK_ELEMENTS = {"cpu": 1 << 22}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 26


def tile_mass(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    *,
    block_size: int = 64,
    scale: float | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    r"""Computes where dense attention goes, block by block.

    .. math:: m_{ij} = \frac{\sum_{n \in i} w_n \sum_{k \in j} P_{nk}}{\sum_{n \in i} w_n}, \qquad
              P = \mathrm{softmax}(s\, q k^\top + \text{mask})

    Some rows at a time, in float32 (float64 for float64): memory is linear in the tokens, time
    quadratic. No gradient.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``.
        mask: Which keys a query sees.
        block_size: Tokens per block.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        row_weights: w, ``(batch or 1, num_heads or 1, q_len)``, not negative, such as the norm of
            the output's gradient; 0 leaves a query out. None: all alike.

    Returns:
        ``(batch, num_heads, i, j)`` float32: rows sum to 1, or are 0 where nothing is seen or every
        weight is 0.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 100, 2, 8)
        >>> mass = tile_mass(x, x, AttentionMask(100, 100, causal=True), block_size=32)
        >>> mass.shape, bool(torch.allclose(mass.sum(-1), torch.ones(1, 2, 4)))
        (torch.Size([1, 2, 4, 4]), True)
    """
    return _tiles(query, key, mask, block_size, scale, row_weights, peak=False)


def tile_peak(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    *,
    block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    r"""Computes what the query that asks most for a key block gives it.

    .. math:: p_{ij} = \max_{n \in i} \sum_{k \in j} P_{nk}, \qquad
              P = \mathrm{softmax}(s\, q k^\top + \text{mask})

    A block that one query needs may have little of the mean over its row (:func:`tile_mass`). Some
    rows at a time, in float32 (float64 for float64), without gradient.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``.
        mask: Which keys a query sees.
        block_size: Tokens per block.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.

    Returns:
        ``(batch, num_heads, i, j)`` float32 in [0, 1]; 0 where nothing is seen.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 100, 2, 8)
        >>> mask = AttentionMask(100, 100, causal=True)
        >>> peak = tile_peak(x, x, mask, block_size=32)
        >>> bool((peak >= tile_mass(x, x, mask, block_size=32) - 1e-6).all())
        True
    """
    return _tiles(query, key, mask, block_size, scale, None, peak=True)


def _tiles(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    block_size: int,
    scale: float | None,
    row_weights: Tensor | None,
    *,
    peak: bool,
) -> Tensor:
    """The mean over a block's rows of where their softmax goes, or the largest of them."""
    batch, q_len, heads, dim = query.shape
    kv_len, kv_heads = key.shape[1], key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    blocks_q, blocks_k = ceil_div(q_len, block_size), ceil_div(kv_len, block_size)
    device = query.device
    out = torch.zeros(batch, heads, blocks_q, blocks_k, dtype=wide, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        keys = key.detach().to(wide).permute(0, 2, 3, 1)[:, :, None]
        for first, last, end in chunks(mask, batch * heads, block_size, device):
            part = query[:, first:last].detach().to(wide).transpose(1, 2)
            part = part.unflatten(1, (kv_heads, heads // kv_heads))
            logits = (part * scale @ keys[..., :end]).flatten(1, 2)
            rows = torch.arange(first, last, device=device).view(1, 1, -1, 1)
            seen = mask.tokens(rows, torch.arange(end, device=device).view(1, 1, 1, -1))
            weights = logits.new_ones(1, 1, last - first)
            if row_weights is not None:
                weights = row_weights[..., first:last].to(wide)
            mass = mass_of_rows(logits, seen, weights, block_size, block_size, peaks=peak)[-1]
            rows_out = slice(first // block_size, ceil_div(last, block_size))
            out[:, :, rows_out, : mass.shape[-1]] = mass
    return out.float()


def mass_of_rows(
    logits: Tensor,
    seen: Tensor,
    weights: Tensor,
    rows_per_block: int,
    block_size: int,
    *,
    peaks: bool = False,
) -> Tensor:
    """The mean over each block's rows of where their softmax goes; differentiable.

    Args:
        logits: ``(b, h, n, m)``; the first row begins a block.
        seen: Booleans that broadcast to the same shape.
        weights: ``(b or 1, h or 1, n)``, not negative.
        rows_per_block: Rows of a query block.
        block_size: Keys of a key block.
        peaks: Also the largest share that a row gives, times its weight; without gradient.

    Returns:
        ``(1, b, h, i, j)``, with ``peaks`` ``(2, b, h, i, j)``; rows that see nothing add nothing,
        and a block of weight 0 is 0.
    """
    # Rows of weight 0 may hold anything: they are left out here, for 0 * NaN is NaN.
    counted = seen & (weights != 0)[..., None]
    p = torch.where(counted, logits, torch.finfo(logits.dtype).min).softmax(-1)
    # Padding by nothing would copy all the same.
    if missing := -p.shape[-1] % block_size:
        p = F.pad(p, (0, missing))
    p = p.unflatten(-1, (-1, block_size)).sum(-1)
    p = p * (seen.any(-1) * weights)[..., None]
    if short := -p.shape[2] % rows_per_block:
        p, weights = F.pad(p, (0, 0, 0, short)), F.pad(weights, (0, short))
    p = p.unflatten(2, (-1, rows_per_block))
    total = weights.unflatten(2, (-1, rows_per_block)).sum(3)
    mean = p.sum(3) / total[..., None].clamp(min=torch.finfo(p.dtype).tiny)
    return torch.stack([mean, p.detach().amax(3)]) if peaks else mean[None]


def chunks(
    mask: AttentionMask, maps: int, block_size: int, device: torch.device
) -> Iterator[tuple[int, int, int]]:
    """First and last row of each chunk of whole query blocks, and the keys that it may see."""
    limit = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    step = max(limit // max(maps * mask.kv_len * block_size, 1), 1) * block_size
    first = 0
    # Not range(), for which torch.compile would fix the length.
    while first < mask.q_len:
        last, end = min(first + step, mask.q_len), mask.kv_len
        if mask.causal and isinstance(mask.query_offset, int):
            end = min(max(last + mask.query_offset, 1), end)
        yield first, last, end
        first += step


# Bounds of one chunk of query tokens: 2**24 float32 numbers are 64 MiB.
_QUERY_ELEMENTS = 1 << 24


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
    step = max(_QUERY_ELEMENTS // max(batch * heads * highest.shape[1] * block_size, 1), 1)
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
