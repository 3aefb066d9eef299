"""How many blocks a row can get at most, from lengths alone: nothing waits for a GPU."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import torch

from dilated_attention_pytorch.candidates import CandidateRule, row_ranges
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
    num_tokens: int,
    block_size: int,
    num_sink_blocks: int,
    num_local_blocks: int,
    *,
    causal: bool = True,
) -> float:
    """The sparsity of rows that read their forced blocks alone: no choice is left above it.

    Args:
        num_tokens: Length.
        block_size: Tokens per block.
        num_sink_blocks: Forced at the start.
        num_local_blocks: Forced beside a row's own block, which is forced, too: before it, or on
            both sides if not causal.
        causal: Whether rows see their past alone.

    Example:
        >>> round(most_sparse(2048, 64, 1, 0), 3)
        0.881
    """
    blocks = ceil_div(num_tokens, block_size)
    forced = 1 + num_sink_blocks + num_local_blocks * (1 if causal else 2)
    seen = range(1, blocks + 1) if causal else [blocks] * blocks
    return 1 - sum(min(n, forced) for n in seen) / max(sum(seen), 1)


def fitting_block_size(num_tokens: int) -> int:
    """A block size that leaves something to choose: 64 blocks or more, of 16 to 64 tokens.

    Args:
        num_tokens: Length, positive.

    Example:
        >>> [fitting_block_size(n) for n in (512, 2048, 8192)]
        [16, 32, 64]
    """
    return min(64, max(16, 1 << max(num_tokens // 64, 1).bit_length() - 1))


def fitting_sparsity(
    num_tokens: int, block_size: int, num_sink_blocks: int = 0, num_local_blocks: int = 0
) -> float:
    """A sparsity at which rows choose at least as many blocks as they must read.

    0.8 below 1,024 tokens and 0.9 from there on, less where blocks are too large for that, in
    steps of 0.05.

    Args:
        num_tokens: Length of causal sequences.
        block_size: Tokens per block.
        num_sink_blocks: Forced at the start.
        num_local_blocks: Forced before a row's own block, which is forced, too.

    Example:
        >>> [fitting_sparsity(n, fitting_block_size(n)) for n in (256, 512, 2048, 8192)]
        [0.75, 0.8, 0.9, 0.9]
    """
    goal = 0.8 if num_tokens < 1024 else 0.9
    limit = 2 * most_sparse(num_tokens, block_size, num_sink_blocks, num_local_blocks) - 1
    return min(goal, max(math.floor(20 * limit + 1e-9), 0) / 20)


class BlockSettings(Protocol):
    """What forces blocks, of any kind of settings."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    def num_sink_blocks(self) -> int:
        """Forced at the start."""

    @property
    def num_local_blocks(self) -> int:
        """Forced beside a row's own block."""


@lru_cache(maxsize=1024)
def nothing_to_choose(
    config: BlockSettings, sparsity: float, num_tokens: int, *, causal: bool = True
) -> str | None:
    """What to say where forced blocks use up a sparsity's budget; None where a choice is left.

    Args:
        config: Settings of a selector.
        sparsity: Share of the tiles to leave out.
        num_tokens: Length.
        causal: Whether rows see their past alone.
    """
    block_size, forced = config.block_size, (config.num_sink_blocks, config.num_local_blocks)

    def limit(size: int) -> float:
        return most_sparse(num_tokens, size, *forced, causal=causal)

    most = limit(block_size)
    if sparsity <= most:
        return None
    blocks = ceil_div(num_tokens, block_size)
    seen = (blocks + 1) / 2 if causal else blocks
    # Half of what is read is chosen there.
    smaller = [n for n in (64, 32, 16) if n < block_size and 2 * limit(n) - 1 >= sparsity]
    lower = max(math.floor(20 * (2 * most - 1) + 1e-9), 0) / 20
    ways = [f"block_size={n}" for n in smaller[:1]] + [f"base_sparsity={lower:g}"] * (lower > 0)
    advice = f"Take {' or '.join(ways)}" if ways else "Take longer sequences"
    return (
        f"nothing is left to choose at sparsity {sparsity:g}: in {num_tokens:,} tokens a row sees "
        f"{seen:.1f} blocks of {block_size} on average and may read {(1 - sparsity) * seen:.2f} of "
        f"them, but {(1 - most) * seen:.2f} are always read. {advice}."
    )


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
        candidates = CandidateRule(
            num_heads, ceil_div(kv_len, block_size), block_size, causal, segment_lengths,
            dilation_rates, num_local_blocks, num_sink_blocks,
        ).build(rows)  # fmt: skip
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
