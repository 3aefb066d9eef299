"""The oracle: dense logits, masked to the kept tiles, in any dtype up to float64.

Quadratic in tokens by design; nothing else in the package is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments


def reference_attention(args: Arguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_attention` defines them."""
    if args.query.device.type == "meta":
        return _attention(args)
    # It promises float32 at least.
    with torch.autocast(args.query.device.type, enabled=False):
        return _attention(args)


def _attention(args: Arguments) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if args.query.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (args.query, args.key, args.value))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n, m = q.shape[2], k.shape[2]

    def to_tokens(tiles: Tensor) -> Tensor:
        tiles = tiles.repeat_interleave(q.shape[1] // tiles.shape[1], 1)
        size_q, size_k = args.pattern.block_size
        return tiles.repeat_interleave(size_q, 2)[:, :, :n].repeat_interleave(size_k, 3)[..., :m]

    rows = torch.arange(n, device=q.device).view(1, 1, n, 1)
    columns = torch.arange(m, device=q.device).view(1, 1, 1, m)
    visible = to_tokens(args.pattern.to_dense()) & args.mask.tokens(rows, columns)
    bias = None
    if args.block_bias is not None:
        bias = to_tokens(_slots_to_tiles(args, args.block_bias))
        # Nobody reads a tile with a bias of -inf.
        visible = visible & (bias != -torch.inf)
    logits = pair_products(q, k, visible) * args.scale
    if bias is not None:
        logits = logits + bias
    logits = torch.where(visible, logits, -torch.inf)
    # A row that reads something whose logit is -inf is not one that reads nothing.
    empty = ~visible.any(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0)
    lse = logits.logsumexp(-1, keepdim=True)
    p = torch.where(visible, (logits - lse).exp(), 0)
    out = visible_sum(p, v, visible).transpose(1, 2)
    if args.mass_probe is not None:
        out = _MassTap.apply(out, args.mass_probe, p.detach(), empty, args)
    return out.to(args.query.dtype), lse.masked_fill(empty, -torch.inf).squeeze(-1)


def _slots_to_tiles(args: Arguments, per_slot: Tensor) -> Tensor:
    """Spreads ``(b, p, i, k)`` over ``(b, p, i, j)``."""
    pattern = args.pattern
    index = torch.where(pattern.slot_used(), pattern.kv_indices, pattern.num_key_blocks).long()
    tiles = per_slot.new_zeros(*index.shape[:3], pattern.num_key_blocks + 1)
    return tiles.scatter_add(-1, index, per_slot)[..., :-1]


class _MassTap(torch.autograd.Function):
    """Identity on the output; in the backward pass the probe's gradient is the tile mass."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, probe: Tensor, p: Tensor, empty: Tensor, args: Arguments
    ) -> Tensor:
        ctx.save_for_backward(p, empty)
        ctx.args, ctx.probe_dtype = args, probe.dtype
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        p, empty = ctx.saved_tensors
        pattern = ctx.args.pattern
        (size_q, size_k), (b, h, n, m) = pattern.block_size, p.shape
        i, j, heads = pattern.num_query_blocks, pattern.num_key_blocks, pattern.num_heads
        # (b, p, heads sharing it, i, rows)
        norm = grad.norm(dim=-1).transpose(1, 2).masked_fill(empty.squeeze(-1), 0)
        w = F.pad(norm, (0, i * size_q - n))
        w = w.view(b, heads, h // heads, i, size_q)
        w = w / w.sum((2, 4), keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        p = F.pad(p, (0, j * size_k - m, 0, i * size_q - n))
        p = p.view(b, heads, h // heads, i, size_q, j, size_k).sum(-1)
        mass = (p * w[..., None]).sum((2, 4))
        # One more, for slots that hold no block.
        place = torch.where(pattern.slot_used(), pattern.kv_indices, j).long()
        slots = F.pad(mass, (0, 1)).gather(-1, place)
        return grad, slots.to(ctx.probe_dtype), None, None, None


# Rows whose products are spelled out at a time where something is not finite.
_ROWS = 16


def pair_products(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """``a @ b^T`` ``(..., n, m)`` where ``seen``, 0 elsewhere."""
    products: Tensor = _Pairs.apply(a, b, seen)
    return products


def visible_sum(weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """``Σ_m weights[n, m] x[m]`` ``(..., n, d)`` over the m where ``seen[n, m]``."""
    total: Tensor = _Sum.apply(weights, x, seen)
    return total


class _Pairs(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen, a @ b.mT, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, seen = ctx.saved_tensors
        return visible_sum(grad, b, seen), visible_sum(grad.mT, a, seen.mT), None

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor, b_tangent: Tensor, _: None) -> Tensor:
        a, b, seen = ctx.saved_tensors
        return pair_products(a_tangent, b, seen) + pair_products(a, b_tangent, seen)


class _Sum(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        x = torch.where(seen.any(-2)[..., None], x, 0)
        kept = torch.where(seen, weights, 0)
        finite = x.isfinite().all(-1, keepdim=True)
        # Values cannot be looked at in a mapped call.
        if not torch._C._are_functorch_transforms_active() and bool(finite.all()):
            return kept @ x
        parts = []
        for some, visible in zip(weights.split(_ROWS, -2), seen.split(_ROWS, -2), strict=True):
            products = some[..., None] * x[..., None, :, :]
            parts.append(torch.where(visible[..., None], products, 0).sum(-2))
        # Rows that read nothing special keep every bit.
        special = (seen & ~finite.mT).any(-1, keepdim=True)
        return torch.where(special, torch.cat(parts, -2), kept @ torch.where(finite, x, 0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, x, seen = ctx.saved_tensors
        return pair_products(grad, x, seen), visible_sum(weights.mT, grad, seen.mT), None

    @staticmethod
    def jvp(ctx: Any, weights_tangent: Tensor, x_tangent: Tensor, _: None) -> Tensor:
        weights, x, seen = ctx.saved_tensors
        return visible_sum(weights_tangent, x, seen) + visible_sum(weights, x_tangent, seen)
