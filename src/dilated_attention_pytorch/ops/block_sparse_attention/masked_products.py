"""Products of matrices over visible pairs alone, with derivatives of any order.

0 * NaN is NaN: a product with weights of 0 would carry what a row must not read into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

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
