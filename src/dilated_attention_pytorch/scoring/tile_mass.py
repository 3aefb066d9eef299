"""Tile mass: the share of a query block's attention that each key block gets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask, ceil_div

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
            mass = mass_of_rows(logits, seen, weights, block_size, block_size)
            rows_out = slice(first // block_size, ceil_div(last, block_size))
            out[:, :, rows_out, : mass.shape[-1]] = mass
    return out.float()


def mass_of_rows(
    logits: Tensor, seen: Tensor, weights: Tensor, rows_per_block: int, block_size: int
) -> Tensor:
    """The mean over each block's rows of where their softmax goes; differentiable.

    Args:
        logits: ``(b, h, n, m)``; the first row begins a block.
        seen: Booleans that broadcast to the same shape.
        weights: ``(b or 1, h or 1, n)``, not negative.
        rows_per_block: Rows of a query block.
        block_size: Keys of a key block.

    Returns:
        ``(b, h, i, j)``; rows that see nothing add nothing, and a block of weight 0 is 0.
    """
    # Rows of weight 0 may hold anything: they are left out here, for 0 * NaN is NaN.
    counted = seen & (weights != 0)[..., None]
    p = torch.where(counted, logits, torch.finfo(logits.dtype).min).softmax(-1)
    p = F.pad(p, (0, -p.shape[-1] % block_size)).unflatten(-1, (-1, block_size)).sum(-1)
    p = p * (seen.any(-1) * weights)[..., None]
    short = -p.shape[2] % rows_per_block
    p = F.pad(p, (0, 0, 0, short)).unflatten(2, (-1, rows_per_block)).sum(3)
    total = F.pad(weights, (0, short)).unflatten(2, (-1, rows_per_block)).sum(3)
    return p / total[..., None].clamp(min=torch.finfo(p.dtype).tiny)


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
