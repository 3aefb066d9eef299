"""Where dense attention would put its weight, tile by tile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask, ceil_div


@torch.no_grad()
def tile_mass(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    *,
    block_size: int,
    scale: float | None = None,
    weights: Tensor | None = None,
    pattern_heads: int | None = None,
) -> Tensor:
    r"""The share of a query block's *dense* attention that each key block holds.

    :math:`m_{ij} = \sum_n w_n \sum_{m \in j} \mathrm{softmax}_m(s\, q_n \cdot k_m)` over the tokens
    n of query block i, with weights that sum to one per block (and group of heads). Computed one
    query block at a time; quadratic in time, linear in memory.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``.
        mask: The token rule.
        block_size: Tokens per block.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        weights: ``(batch, q_len, num_heads)``, not negative: how much each row counts, such as the
            norm of its output gradient. None: all alike.
        pattern_heads: Heads to return; those that share a pattern are merged. None: num_heads.

    Returns:
        ``(batch, pattern_heads, i, j)`` float32. Rows sum to 1, or to 0 where no token of the
        block sees a key or has weight.
    """
    batch, q_len, heads, dim = query.shape
    groups = heads if pattern_heads is None else pattern_heads
    scale = dim**-0.5 if scale is None else scale
    q, k = query.float().transpose(1, 2), key.float().transpose(1, 2)
    k = k.repeat_interleave(heads // k.shape[1], 1)
    if weights is None:
        weights = torch.ones(batch, q_len, heads, dtype=torch.float32, device=query.device)
    w = weights.float().transpose(1, 2)
    blocks = ceil_div(mask.kv_len, block_size)
    columns = torch.arange(mask.kv_len, device=query.device).view(1, 1, 1, -1)
    rows = []
    for start in range(0, q_len, block_size):
        stop = min(start + block_size, q_len)
        numbers = torch.arange(start, stop, device=query.device).view(1, 1, -1, 1)
        visible = mask.tokens(numbers, columns)
        logits = (q[:, :, start:stop] @ k.transpose(-1, -2) * scale).masked_fill(
            ~visible, -torch.inf
        )
        seen = visible.any(-1, keepdim=True)
        p = logits.masked_fill(~seen, 0).softmax(-1).masked_fill(~seen, 0)
        p = F.pad(p, (0, blocks * block_size - mask.kv_len))
        tiles = p.unflatten(-1, (blocks, block_size)).sum(-1)
        # (batch, groups, heads of the group, tokens)
        share = (w[:, :, start:stop] * seen[..., 0]).unflatten(1, (groups, -1))
        share = share / share.sum((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        rows.append((tiles.unflatten(1, (groups, -1)) * share[..., None]).sum((2, 3)))
    return torch.stack(rows, 2)
