"""The PyTorch backend: batched products over gathered blocks, a cache-sized chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention.arguments import readable
from dilated_attention_pytorch.ops.block_sparse_attention.gather import (
    all_finite,
    rows_and_steps,
    weighted_sum,
)
from dilated_attention_pytorch.ops.block_sparse_decode.arguments import DecodeArguments

# Numbers of gathered keys at a time on the CPU: 2**18 float32 numbers are 1 MiB, so that the
# products read them from the processor's cache and main memory is read once.
_CHUNK_NUMBERS = {"cpu": 1 << 18}
_CHUNK_NUMBERS_ELSEWHERE = 1 << 26


def gather_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_decode` defines them.

    Does not wait for the device; lists shorter than the widest cost as much as the widest.
    """
    with torch.autocast(args.query.device.type, enabled=False):
        return _decode(args)


def _decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """One row per list and group: the query heads of its tokens that share keys and list."""
    batch, n, heads, dim = args.query.shape
    wide = torch.float64 if args.query.dtype == torch.float64 else torch.float32
    if 0 in (args.query.numel(), args.key.numel(), args.indices.numel()):
        nothing = args.query.new_full((batch, heads, n), -torch.inf, dtype=wide)
        return torch.zeros_like(args.query), nothing
    kv_heads, lists = args.key.shape[2], args.counts.shape[1]
    planes = max(kv_heads, lists)
    group, per_list = heads // planes, n // args.counts.shape[2]
    query = args.query.reshape(batch, n // per_list, per_list, planes, group, dim)
    query = query.permute(0, 3, 1, 2, 4, 5).to(wide) * args.scale
    index, visible = _tokens(args, planes)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:-1], dtype=wide, device=query.device)
    bias = None
    if args.block_bias is not None:
        bias = args.block_bias.repeat_interleave(args.block_size, -1)
        bias = bias.repeat_interleave(planes // lists, 1)
    limit = _CHUNK_NUMBERS.get(query.device.type, _CHUNK_NUMBERS_ELSEWHERE)
    step = min(max(limit // max(index.shape[2] * index.shape[3] * dim, 1), 1), planes)
    keys, values = _Rows(args.key), _Rows(args.value)
    head = torch.arange(planes, device=query.device) // (planes // kv_heads)
    for b in range(batch):
        for first in range(0, planes, step):
            part = slice(first, first + step)
            tokens = index[b, part]
            q = query[b, part]
            k = keys.take(b, head[part], tokens).to(wide)
            logits = (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, (per_list, group))
            if bias is not None:
                logits += bias[b, part, :, None, None]
            logits.masked_fill_(~visible[b, part, :, :, None], -torch.inf)
            high = logits.amax(-1, keepdim=True)
            empty = high == -torch.inf
            weights = logits.sub_(high.masked_fill_(empty, 0)).exp_()
            total = weights.sum(-1, keepdim=True)
            v = values.take(b, head[part], tokens).to(wide)
            x = _weighted_sum(weights, v, visible[b, part])
            # A row without tokens has weights of 0, but 0 * nan and 0 / 0 are nan.
            out[b, part] = (x / total).masked_fill(empty, 0)
            # An infinite logit takes all the weight: not inf - inf.
            of_rows = (total.log() + high).masked_fill(high == torch.inf, torch.inf)
            lse[b, part] = of_rows.squeeze(-1)
    # Planes and groups are the heads, lists and their tokens the tokens.
    out = out.permute(0, 2, 3, 1, 4, 5).reshape(args.query.shape)
    return out.to(args.query.dtype), lse.permute(0, 1, 4, 2, 3).reshape(batch, heads, n)


def _weighted_sum(weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """``(p, l, t, g, m)`` weights of ``(p, l, m, d)`` values, ``(p, l, t, g, d)``.

    Where looking costs no wait, values that are not finite reach those of the t queries alone that
    see them: a later one may see more than an earlier one.
    """
    rows = weights.flatten(0, 1).flatten(1, 2)
    x = rows.new_empty(*rows.shape[:2], v.shape[-1])
    hidden = None
    if weights.shape[2] > 1 and readable(v) and not all_finite(v):
        hidden = ~visible[:, :, :, None].expand(weights.shape).flatten(0, 1).flatten(1, 2)
    weighted_sum(rows, v.flatten(0, 1), hidden, x)
    return x.view(*weights.shape[:-1], -1)


def _tokens(args: DecodeArguments, planes: int) -> tuple[Tensor, Tensor]:
    """Cache positions of each list's tokens, and which of them each of its queries sees.

    Returns:
        ``(b, planes, l, k * block_size)`` for l lists, and booleans ``(b, planes, l, n / l, k *
        block_size)``.
    """
    size, lists = args.block_size, args.counts.shape[2]
    limits = args.limits().unflatten(1, (lists, -1))[:, None, :, :, None]
    inside = torch.arange(size, device=args.indices.device)
    token = (args.indices.long()[..., None] * size + inside).flatten(-2)
    listed = args.listed().repeat_interleave(size, -1)
    visible = listed[:, :, :, None] & (token[:, :, :, None] < limits)
    # What nobody sees repeats the first token that is seen. The last query sees all that those
    # before it see.
    seen = visible[:, :, :, -1]
    if token.shape[-1]:
        token = torch.where(seen, token, token.gather(-1, seen.int().argmax(-1, keepdim=True)))
    if args.starts is not None:
        token = token + args.starts.long().view(-1, 1, 1, 1)
    token = token.clamp(0, max(args.key.shape[1] - 1, 0))
    repeat = planes // token.shape[1]
    return token.repeat_interleave(repeat, 1), visible.repeat_interleave(repeat, 1)


class _Rows:
    """A cache as rows of ``head_dim`` numbers, gathered without a copy of the cache."""

    def __init__(self, x: Tensor) -> None:
        self.rows, self.strides = rows_and_steps(x)

    def take(self, batch: int, heads: Tensor, tokens: Tensor) -> Tensor:
        """Tokens ``(p, n, t)`` of heads ``(p,)`` of one sample as ``(p, n, t, d)``."""
        base = heads * self.strides[2] + batch * self.strides[0]
        place = tokens * self.strides[1] + base[:, None, None]
        return self.rows.index_select(0, place.flatten()).view(*tokens.shape, -1)
