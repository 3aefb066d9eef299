"""Products of blocks or tokens whose gradient passes by what is no number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # Autocast may have made the product in another dtype.
        saved = (x.to(grad.dtype) for x in ctx.saved_tensors)
        q, k = (torch.where(x.isfinite(), x, 0) for x in saved)
        return grad @ k, grad.mT @ q


def score_products(q: Tensor, k: Tensor) -> Tensor:
    """``q @ k.mT``, of which a pair without a gradient gives none, even if it is no number.

    All pairs are multiplied, those that nobody may read, too. Their gradient is 0, and 0 * NaN
    would make NaN of the gradients of everything that meets the same row. A pair that was read
    passes on its own gradient, which is NaN already where its score was.

    Args:
        q: ``(..., i, r)``.
        k: ``(..., j, r)``, of as many leading dimensions.
    """
    if not torch.is_grad_enabled():
        return q @ k.mT
    product: Tensor = _Product.apply(q, k)
    return product


def finite_rows(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both with zeros in the place of rows that hold what is no number, and which pairs do.

    For scores that are no plain product: NaN put back in the pairs with :func:`torch.where` stops
    their gradient.

    Args:
        q: ``(..., i, r)``.
        k: ``(..., j, r)``.

    Returns:
        Both, and booleans ``(..., i, j)``: True where one of the pair is no number.
    """
    bad_q, bad_k = (~x.isfinite().all(-1, keepdim=True) for x in (q, k))
    return torch.where(bad_q, 0, q), torch.where(bad_k, 0, k), bad_q | bad_k.mT


def take_columns(scores: Tensor, candidates: Tensor) -> Tensor:
    """Columns ``candidates`` of ``(b, h, i, j)``; numbers outside read column 0 or the last.

    Without any column to read, zeros.
    """
    if scores.shape[-1] == 0:
        scores = F.pad(scores, (0, 1))
    index = candidates.clamp(0, scores.shape[-1] - 1).long()
    return scores.gather(-1, index.expand(*scores.shape[:3], -1))
