"""The relaxed, differentiable top-k; for recorded programs one operator whatever k is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LARGEST = 1 - 1e-6


def relaxed_top_k(
    logits: Tensor, count: Tensor, max_count: int, temperature: Tensor | float
) -> Tensor:
    r"""Soft k-hot vectors: k softmaxes in a row, each without what the ones before took.

    :math:`\alpha^{1} = z,\ p^{t} = \mathrm{softmax}(\alpha^{t}/\tau),\
    \alpha^{t+1} = \alpha^{t} + \log(1 - p^{t})`, and the sum of the p (Xie and Ermon 2019,
    arXiv 1901.10517, section 3.2).

    Args:
        logits: ``(..., c)``; -inf excludes a column.
        count: k per row, ``(...)``; at most the number of columns that are not excluded.
        max_count: An upper bound of ``count``.
        temperature: τ > 0; towards 0 the result becomes k-hot.

    Returns:
        Weights in [0, 1], differentiable in ``logits``. They sum to at most k: what a column
        would get above 1 is cut off, which vanishes as τ falls.
    """
    if not torch.compiler.is_compiling():
        return _sum_of_steps(logits, count, max_count, temperature).clamp(max=1)
    # A graph would hold the steps one by one, and be another one for every number of them.
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=logits.dtype, device=logits.device)
    weights: Tensor = _op(logits, count, max_count, temperature)
    return weights


def _sum_of_steps(
    logits: Tensor, count: Tensor, max_count: int, temperature: Tensor | float,
    levels: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The sum of the softmaxes; ``levels`` takes the α of every step."""
    alpha = logits.masked_fill(logits == -torch.inf, 0)
    out = torch.zeros_like(logits)
    for step in range(max_count):
        if levels is not None:
            levels.append(alpha)
        p = _softmax(alpha, logits, temperature)
        out = out + p * (step < count)[..., None]
        alpha = alpha + torch.log1p(-p.clamp(max=_LARGEST))
    return out


def _softmax(alpha: Tensor, logits: Tensor, temperature: Tensor | float) -> Tensor:
    excluded = logits == -torch.inf
    # Over a temperature below 1 the lowest number is -inf, whose gradient in τ is NaN.
    scaled = (alpha / temperature).masked_fill(excluded, torch.finfo(logits.dtype).min)
    return scaled.softmax(-1).masked_fill(excluded, 0)


@torch.library.custom_op("dilated_attention_pytorch::relaxed_top_k", mutates_args=())
def _op(logits: Tensor, count: Tensor, max_count: int, temperature: Tensor) -> Tensor:
    return _sum_of_steps(logits, count, max_count, temperature).clamp(max=1).contiguous()


@torch.library.custom_op("dilated_attention_pytorch::relaxed_top_k_backward", mutates_args=())
def _backward_op(
    grad: Tensor, logits: Tensor, count: Tensor, max_count: int, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and temperature, from the last step to the first."""
    levels: list[Tensor] = []
    total = _sum_of_steps(logits, count, max_count, temperature, levels)
    grad = grad.masked_fill(total > 1, 0)
    of_alpha, of_temperature = torch.zeros_like(grad), torch.zeros_like(temperature)
    for step in reversed(range(max_count)):
        alpha = levels.pop()
        p = _softmax(alpha, logits, temperature)
        through_rest = (of_alpha / (p - 1)).masked_fill(p > _LARGEST, 0)
        of_p = grad * (step < count)[..., None] + through_rest
        of_scaled = p * (of_p - (p * of_p).sum(-1, keepdim=True))
        of_alpha = of_alpha + of_scaled / temperature
        of_temperature = of_temperature - (of_scaled * alpha).sum() / temperature.square()
    return of_alpha.contiguous(), of_temperature.to(temperature.dtype)


@_op.register_fake
def _(logits: Tensor, count: Tensor, max_count: int, temperature: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_backward_op.register_fake
def _(
    grad: Tensor, logits: Tensor, count: Tensor, max_count: int, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return like, torch.empty_like(temperature)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, count, ctx.max_count, temperature = inputs
    ctx.save_for_backward(logits, count, temperature)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    logits, count, temperature = ctx.saved_tensors
    of_logits, of_temperature = _backward_op(grad, logits, count, ctx.max_count, temperature)
    return of_logits, None, None, of_temperature


_op.register_autograd(_backward, setup_context=_save)
