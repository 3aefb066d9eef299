"""The choice of blocks in PyTorch, with the contract of the fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.pattern import pack_ascending
from dilated_attention_pytorch.selection.top_k import choose_top_k, gumbel_noise, uniform_noise


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
        explore: Uniformly random extra blocks per row.
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
        extra = count.new_full(scores.shape[:3], explore)
        chosen = chosen | choose_top_k(lottery, free & ~chosen, extra, explore)
    every = chosen | forced
    counts = every.sum(-1, dtype=torch.int32).clamp(max=width)
    lists = pack_ascending(every, width, number)
    scored = pack_ascending(every, width, chosen.int()).bool()
    return counts, lists, scored
