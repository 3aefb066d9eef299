"""The selector's signal: pull its softmax towards where the attention went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mass_target_probe(
    scores: Tensor,
    scored: Tensor,
    weight: float,
    tiles_per_loss: int,
    learn: Callable[..., None] | None = None,
    *known: Tensor | None,
) -> Tensor:
    r"""A probe that turns the tile mass, its gradient, into a gradient of the scores.

    Pass the result as ``mass_probe`` to :func:`block_sparse_attention`. In the backward pass it
    receives the tile mass m (attention weighted by the output gradient) and gives the scores

    .. math:: \frac{\lambda}{R}\, w_i\, (\mathrm{softmax}(S_i) - T_i), \qquad
              T_{ij} = m_{ij} / \sum_{j'} m_{ij'}, \qquad w_i = \max_j m_{ij}

    over the scored kept tiles of row i: the gradient of a cross entropy between T and the
    selector's softmax, in rows that attend to scored tiles at all. No term is added to the loss.
    The gradient does not scale with the loss: with accumulation over n batches it adds up n times.

    Args:
        scores: ``(b, h, i, k)``: scores of the kept tiles.
        scored: Booleans of the same shape: kept by score or exploration, not forced.
        weight: λ.
        tiles_per_loss: R: the rows that the signal is averaged over.
        learn: Called in the backward pass with scores, ``scored``, the mass of the scored tiles in
            float32, 0 elsewhere, and ``known``. A function, not a method: torch.compile takes no
            other. None: nobody asks.
        *known: What it needs besides; it may write to them.

    Returns:
        Zeros ``(b, h, i, k)`` float32 that carry the gradient.
    """
    return _MassTarget.apply(scores, scored, weight / max(tiles_per_loss, 1), learn, *known)


class _MassTarget(torch.autograd.Function):
    @staticmethod
    def forward(
        scores: Tensor, scored: Tensor, weight: float, learn: Any, *known: Tensor | None
    ) -> Tensor:
        return torch.zeros_like(scores, dtype=torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scores, scored, ctx.weight, ctx.learn, *known = inputs
        # Not saved for the backward pass: what is written to in between is meant to be read then.
        ctx.known = known
        ctx.save_for_backward(scores, scored)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mass: Tensor) -> tuple[Tensor | None, ...]:
        scores, scored = ctx.saved_tensors
        if ctx.learn is not None:
            ctx.learn(scores, scored, mass.float().masked_fill(~scored, 0), *ctx.known)
        gradient = mass_target_gradient(scores, scored, mass, ctx.weight)
        return gradient, None, None, None, *(None for _ in ctx.known)


def mass_target_gradient(scores: Tensor, scored: Tensor, mass: Tensor, weight: float) -> Tensor:
    """The gradient of :func:`mass_target_probe`'s formula; ``weight`` is λ / R."""
    if not scores.numel():
        return torch.zeros_like(scores)
    mass = mass.float().masked_fill(~scored, 0)
    target = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # Not -inf: a row without scored tiles must not become NaN.
    logits = scores.float().masked_fill(~scored, torch.finfo(torch.float32).min)
    predicted = logits.softmax(-1)
    strength = mass.amax(-1, keepdim=True) * weight
    # Last of all: an unscored slot may stand for any block, and 0 * NaN is NaN.
    return ((predicted - target) * strength).masked_fill(~scored, 0).to(scores.dtype)
