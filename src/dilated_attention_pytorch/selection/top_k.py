"""Choosing the best of every row.

A deterministic top-k, the noise of training on its ranking, its differentiable relaxation, and the
choice of whole rows with the contract of the fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.config import as_int
from dilated_attention_pytorch.pattern import pack_ascending
from dilated_attention_pytorch.runtime import check_booleans, check_floating, check_integers


def choose_top_k(scores: Tensor, allowed: Tensor, count: Tensor, max_count: int) -> Tensor:
    """Chooses the ``count`` highest-scored allowed columns of every row.

    Ties go to the lower column; NaN ranks below everything.

    Args:
        scores: ``(..., c)``.
        allowed: Booleans that broadcast to the same shape.
        count: Integers that broadcast to ``(...)``; more than there are allowed columns means all
            of them.
        max_count: An upper bound of ``count``.

    Returns:
        Booleans ``(..., c)``. Without gradient; does not wait for the device.

    Example:
        >>> import torch
        >>> row = torch.tensor([1.0, 3.0, 3.0, 2.0])
        >>> choose_top_k(row, torch.ones(4).bool(), torch.tensor(1), 1)
        tensor([False,  True, False, False])
    """
    columns = scores.shape[-1]
    k = min(max_count, columns)
    if k == 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    rank = scores.detach().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    rank = torch.where(allowed, rank, -torch.inf)
    best = rank.topk(k, dim=-1).values
    # Not left to gather, which would take the first samples' alone.
    count = count.expand(rank.shape[:-1])[..., None]
    threshold = best.gather(-1, (count - 1).clamp(0, k - 1).long())
    above = rank > threshold
    # Not more than 0 where nothing is to be chosen: the threshold is the best one then.
    missing = count - above.sum(-1, keepdim=True)
    tied = (rank == threshold) & allowed
    return above | (tied & (tied.cumsum(-1) <= missing))


def first_of_all(scores: Tensor, kept: Tensor | None) -> Tensor:
    """Scores that rank some columns above all others, as booleans of their shape name them."""
    return scores if kept is None else scores.detach().masked_fill(kept, torch.inf)


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


def explored(chosen: Tensor, most: int) -> Tensor:
    """How many random blocks a row reads: ``most``, one less for each chosen block but the first.

    A selector learns by comparing the scored blocks of a row, and of two blocks it cannot be told
    how clear attention is. What a row reads by chance it will miss in evaluation, so rows that
    choose enough to compare read one such block.

    Args:
        chosen: Booleans ``(b, h, i, c)``: the blocks that were chosen by score.
        most: At least 1.

    Returns:
        int64 ``(b, h, i)``, from 1 to ``most``.
    """
    return (most + 1 - chosen.sum(-1)).clamp(1, most)


def choose_reference(
    scores: Tensor,
    candidates: Tensor | None,
    intervals: Tensor,
    count: Tensor,
    width: int,
    *,
    temperature: Tensor | None = None,
    explore: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of every row, with its forced and random blocks.

    Args:
        scores: ``(b, p, i, c)``.
        candidates: Numbers ``(1 or b, 1 or p, i, c)`` (negative: none), ascending, or None: the
            column's own.
        intervals: From :meth:`CandidateRule.intervals`.
        count: Blocks per row besides the forced ones, integers ``(1 or b, 1 or p, i)``.
        width: Length of the lists.
        temperature: Factor of the Gumbel noise on the ranking; None: no noise.
        explore: Uniformly random extra blocks per row, see :func:`explored`.
        generator: Source of the randomness.

    Returns:
        Counts ``(b, p, i)`` and ascending lists ``(b, p, i, width)``, int32, and which entries
        were not forced, booleans.
    """
    columns = scores.shape[-1]
    number = torch.arange(columns, device=scores.device) if candidates is None else candidates
    low, end, sink_end, first, last = (x[..., None] for x in intervals[:, None].unbind(2))
    visible = ((number >= low) & (number < end)).expand(scores.shape)
    forced = visible & ((number < sink_end) | ((number >= first) & (number < last)))
    free = visible & ~forced
    ranked = scores.detach()
    if temperature is not None:
        ranked = ranked + gumbel_noise(scores, generator) * temperature
    chosen = choose_top_k(ranked, free, count.expand(scores.shape[:3]), columns)
    if explore:
        lottery = uniform_noise(scores, generator)
        extra = explored(chosen, explore)
        chosen = chosen | choose_top_k(lottery, free & ~chosen, extra, explore)
    every = chosen | forced
    counts = every.sum(-1, dtype=torch.int32).clamp(max=width)
    lists = pack_ascending(every, width, number)
    scored = pack_ascending(every, width, chosen.int()).bool()
    return counts, lists, scored
