"""The oracle: dense logits over the whole cache, masked to the kept blocks; up to float64."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention.reference import (
    pair_products,
    visible_sum,
)
from dilated_attention_pytorch.ops.block_sparse_decode.arguments import DecodeArguments


def reference_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_decode` defines them."""
    dtype = torch.float64 if args.query.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (args.query, args.key, args.value))
    batch, heads, n, _ = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    # Token number of each place in the cache, ``(b, 1, 1, m)``.
    token = torch.arange(k.shape[2], device=q.device).view(1, 1, 1, -1)
    if args.starts is not None:
        token = token - args.starts.long().view(-1, 1, 1, 1)
    visible = (token >= 0) & (token < args.limits()[:, None, :, None])
    block = token.clamp(min=0) // args.block_size
    kept = torch.zeros_like(visible).expand(batch, args.counts.shape[1], n, -1).clone()
    bias = torch.zeros(kept.shape, dtype=dtype, device=q.device)
    listed = args.listed()
    for slot in range(args.indices.shape[-1]):
        here = (block == args.indices[..., slot, None]) & listed[..., slot, None]
        kept |= here
        if args.block_bias is not None:
            bias = torch.where(here, args.block_bias[..., slot, None], bias)
    kept, bias = (x.repeat_interleave(heads // x.shape[1], 1) for x in (kept, bias))
    visible = visible & kept
    logits = torch.where(visible, pair_products(q, k, visible) * args.scale + bias, -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    visible = visible & ~empty
    lse = logits.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
    p = torch.where(visible, (logits - lse).exp(), 0)
    out = visible_sum(p, v, visible)
    lse = lse.masked_fill(empty, -torch.inf).squeeze(-1)
    return out.transpose(1, 2).to(args.query.dtype), lse
