"""Gumbel noise, and sampling by it."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.config import as_int
from dilated_attention_pytorch.runtime import check_booleans, check_floating, check_integers
from dilated_attention_pytorch.selection.relaxed_top_k import relaxed_top_k
from dilated_attention_pytorch.selection.top_k import choose_top_k


def uniform_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Samples from [0, 1) shaped like ``like``, in float32.

    ``torch.compile`` traces this without a generator of one's own alone.
    """
    if generator is None:
        # Even generator=None would break the graph.
        return torch.rand(like.shape, dtype=torch.float32, device=like.device)
    return torch.rand(like.shape, dtype=torch.float32, device=like.device, generator=generator)


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel samples shaped like ``like``, in float32."""
    uniform = uniform_noise(like, generator)
    # Below 2**-24 nothing but 0 is drawn; the largest draw is 1 - 2**-24, so both logs are finite.
    return -(-uniform.clamp(min=2**-25).log()).log()


def gumbel_softmax_topk(
    scores: Tensor,
    k: int | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    hard: bool = True,
    noise: bool = True,
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples k columns per row without replacement, differentiably.

    Gumbel noise on the scores makes the top k a sample without replacement from their softmax
    (Kool et al. 2019, arXiv 1903.06059); :func:`relaxed_top_k` carries the gradient.

    Args:
        scores: ``(..., c)`` floating point.
        k: Columns per row: an int, or integers ``(...)``.
        temperature: τ > 0 of the relaxation.
        hard: Return exact zeros and ones with the gradient of the relaxation (straight through);
            False: the relaxed weights.
        noise: Add Gumbel noise; False: the plain top k.
        allowed: Booleans that broadcast to ``scores``; other columns get 0. None: all.
        generator: Source of the noise. None: torch's default.

    Returns:
        Weights shaped like ``scores``. If hard, they sum to k (to the allowed columns, if fewer)
        per row; relaxed weights sum to at most that.

    Raises:
        TypeError: If ``scores`` or ``temperature`` is not floating point, ``k`` no integers, or
            ``allowed`` no booleans.
        ValueError: If shapes do not fit, or k (an int; a tensor on the CPU) or the temperature is
            out of range.

    Example:
        >>> import torch
        >>> gumbel_softmax_topk(torch.randn(4, 10), k=3).sum(-1)
        tensor([3., 3., 3., 3.])
    """
    check_floating("scores", scores)
    if not scores.dim():
        raise ValueError("scores must be (..., columns), got a tensor without dimensions.")
    k, most = _columns_per_row(k, scores)
    if isinstance(temperature, Tensor):
        check_floating("temperature", temperature)
    elif isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}.")
    elif not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if allowed is None:
        allowed = torch.ones_like(scores, dtype=torch.bool)
    else:
        check_booleans("allowed", allowed)
    allowed = allowed.expand(scores.shape)
    k = torch.minimum(k, allowed.sum(-1))
    logits = scores + gumbel_noise(scores, generator).to(scores.dtype) if noise else scores
    soft = relaxed_top_k(logits.masked_fill(~allowed, -torch.inf), k, most, temperature)
    if not hard:
        return soft
    chosen = choose_top_k(logits, allowed, k, most).to(scores.dtype)
    # Written so that the value is exactly 0 or 1.
    return chosen + (soft - soft.detach())


def _columns_per_row(k: int | Tensor, scores: Tensor) -> tuple[Tensor, int]:
    """k for every row, and the most that any of them has."""
    rows, columns = scores.shape[:-1], scores.shape[-1]
    if not isinstance(k, Tensor):
        k = as_int("k", k)
        if not 0 <= k <= columns:
            raise ValueError(f"k must lie in [0, {columns}] (the columns of scores), got {k}.")
        return torch.full(rows, k, dtype=torch.long, device=scores.device), k
    check_integers("k", k)
    if k.shape != rows:
        raise ValueError(
            f"k must have one entry per row of scores, shape {tuple(rows)}, got {tuple(k.shape)}."
        )
    # Reading values of a GPU would wait for all work before.
    if k.device.type == "cpu" and not torch.compiler.is_compiling() and k.numel():
        low, high = int(k.min()), int(k.max())
        if low < 0 or high > columns:
            raise ValueError(
                f"k must lie in [0, {columns}] (the columns of scores), got {low} to {high}."
            )
    return k, columns
