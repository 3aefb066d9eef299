"""How many blocks a row can get at most, from lengths alone: nothing waits for a GPU."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from dilated_attention_pytorch.candidates import build_candidates, row_ranges
from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.selection.budget import water_level_budget

# Shares are counted in units of 2**-16: lengths can be symbols of torch.compile, whose integers
# it follows better than its floats.
_UNIT = 1 << 16


def most_visible_blocks(
    q_len: int, kv_len: int, causal: bool, query_offset: int, block_size: int, keep: float
) -> int:
    r"""The most blocks that a row may get at the share ``keep`` if it may choose all it sees.

    A closed form: ``torch.compile`` traces it, with symbols in the place of lengths. The level μ
    solves :math:`\sum_i \min(\mu, a_i) = \kappa \sum_i a_i` with a visible blocks per row. The left
    side is concave in μ, so :math:`\mu \le \kappa \max_i a_i`. With a triangle, :math:`a_i = i` for
    i from 1 to I, :math:`\mu \le \alpha (I + 1/2) + 1/8` with
    :math:`\alpha = 1 - \sqrt{1 - \kappa}`. One more block for rounding.

    Args:
        q_len: Query tokens.
        kv_len: Key tokens.
        causal: Whether later keys are hidden.
        query_offset: Key position of query 0.
        block_size: Tokens per block.
        keep: κ, in [0, 1].

    Returns:
        The bound, which may exceed the number of key blocks.
    """
    blocks = ceil_div(kv_len, block_size)
    if causal and q_len == kv_len and query_offset == 0:
        share = math.ceil((1 - math.sqrt(1 - keep)) * _UNIT)
        return (share * (2 * blocks + 1) + _UNIT // 4) // (2 * _UNIT) + 2
    return most_visible_share(blocks, keep)


def most_visible_share(num_blocks: int, keep: float) -> int:
    """The most blocks of a row that gets the share ``keep`` of the ``num_blocks`` that it sees.

    Two blocks more for rounding: of this row's share, and of what the rows before it are owed.
    """
    return math.ceil(keep * _UNIT) * num_blocks // _UNIT + 2


def most_sparse(
    num_tokens: int, block_size: int, num_sink_blocks: int, num_local_blocks: int
) -> float:
    """The sparsity of causal rows that read their forced blocks alone: no choice is left above it.

    Args:
        num_tokens: Length.
        block_size: Tokens per block.
        num_sink_blocks: Forced at the start.
        num_local_blocks: Forced before a row's own block, which is forced, too.

    Example:
        >>> round(most_sparse(2048, 64, 1, 0), 3)
        0.881
    """
    blocks, forced = ceil_div(num_tokens, block_size), 1 + num_sink_blocks + num_local_blocks
    kept = sum(min(row, forced) for row in range(1, blocks + 1))
    return 1 - kept / (blocks * (blocks + 1) / 2)


def halvings(share: float) -> int:
    """How often 1 can be halved and still cover ``share``.

    A schedule that moves ``share`` at every step seldom moves this.
    """
    return math.floor(-math.log2(share))


@lru_cache(maxsize=256)
def most_scored_blocks(
    q_len: int,
    kv_len: int,
    causal: bool,
    query_offset: int,
    has_diagonal: bool,
    block_size: int,
    segment_lengths: tuple[int, ...] | None,
    dilation_rates: tuple[int, ...] | None,
    num_heads: int,
    num_local_blocks: int,
    num_sink_blocks: int,
    keep: float,
) -> int:
    """The most scored blocks that any row may get at the share ``keep``, from lengths alone."""
    device = torch.device("cpu")
    mask = AttentionMask(q_len, kv_len, causal, query_offset)
    rows = row_ranges(mask, (block_size,) * 2, has_diagonal=has_diagonal, device=device)
    if segment_lengths is None:
        # Without forced blocks the level is at least as high as with them.
        forced, limit = torch.zeros_like(rows.low), rows.num_allowed.long()
        width = ceil_div(kv_len, block_size)
    else:
        candidates = build_candidates(
            rows, num_heads=num_heads, num_key_blocks=ceil_div(kv_len, block_size),
            block_size=block_size, causal=causal, segment_lengths=segment_lengths,
            dilation_rates=dilation_rates, num_local_blocks=num_local_blocks,
            num_sink_blocks=num_sink_blocks,
        )  # fmt: skip
        forced = candidates.forced.sum(-1)
        limit = forced + candidates.scored.sum(-1)
        width = candidates.width
    shape = torch.broadcast_shapes(forced.shape, limit.shape)
    level = water_level_budget(
        torch.full(shape, keep, dtype=torch.float32, device=rows.low.device),
        forced,
        limit,
        rows,
        width,
    )
    return int((level - forced).max().ceil()) + 1
