"""How many blocks each row may read.

Three ways: a water level over all rows; a running share of what a row sees, which depends on
nothing later (a level falls when a sequence grows, and generation cannot know by how much); and
the blocks that a row expects to attend to by its scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.candidates import CandidateRule, RowRange, row_ranges
from dilated_attention_pytorch.mask import AttentionMask, ceil_div

# Contents move a row's share by no other factors, whatever gain and offset learn.
LEAST_FACTOR, MOST_FACTOR = 1e-3, 2.0

# The most blocks that a row counts as seeing if it sees fewer: what bounds its list, whatever a
# layer was trained on.
MOST_REACH = 256

# Shares of a block are counted in units of 2**-16, as integers, so that every device rounds alike.
FRACTION_BITS = 16


def get_adaptive_sparsity(seq_len: int) -> float:
    """The base sparsity that suits a sequence length: longer sequences can leave out more.

    Args:
        seq_len: Tokens, positive.

    Returns:
        0.8 below 1,024 tokens, 0.9 below 4,096, 0.95 from there on.

    Raises:
        ValueError: If ``seq_len`` is not positive.

    Example:
        >>> get_adaptive_sparsity(2048)
        0.9
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be positive, got {seq_len}.")
    if seq_len < 1024:
        return 0.8
    return 0.9 if seq_len < 4096 else 0.95


def share_by_content(keep: Tensor, factor: Tensor) -> Tensor:
    """The share of its visible blocks that each row may read: the base share at other odds.

    ``keep / (1 - keep)`` times the factor are the odds of a block being read. So a small share
    grows with the factor, none exceeds 1, and where nothing is to be left out all is kept.

    Args:
        keep: Base share ``1 - base_sparsity``, in (0, 1].
        factor: Of each row, positive; broadcasts with it.

    Returns:
        Shares in (0, 1].

    Example:
        >>> keep, factor = torch.tensor([0.1, 1.0]), torch.tensor([0.5, 0.5])
        >>> share_by_content(keep, factor)
        tensor([0.0526, 1.0000])
    """
    # No product and sum in one, which kernels would round once.
    return 1 / (1 + (1 - keep) / (keep * factor))


def unit_means(means: Tensor) -> Tensor:
    """Unit-norm means ``(b, g, j, d)`` float32 of means ``(b, j, g, d)``; zeros stay zeros."""
    unit = F.normalize(means.detach().float().transpose(1, 2), dim=-1)
    return unit.nan_to_num(0.0, 0.0, 0.0)


def content_complexity(key_means: Tensor, rows: RowRange, *, past_only: bool = False) -> Tensor:
    r"""How unlike a row's own block is to the other blocks that it can see.

    :math:`1 - \frac{1}{n}\sum_{j \ne a} \cos(\bar k_a, \bar k_j)` over the n visible blocks other
    than the row's own block a, clipped to [0, 1]: 0 for repetition, about 1 for unrelated content.
    Without a diagonal (cross-attention) a runs over all visible blocks: the mean over pairs.
    Linear in the number of blocks (prefix sums); a causal row sees only its past. No gradient.
    What all keys have in common, such as a bias or the mean of positive inputs, makes them alike;
    blocks of zeros have no direction and count as unrelated.

    Args:
        key_means: ``(batch, j, num_kv_heads, head_dim)``: mean-pooled key blocks.
        rows: From :func:`row_ranges`.
        past_only: Take the block before the diagonal as the row's own, so that nothing of the
            diagonal block is used.

    Returns:
        ``(batch, num_kv_heads, i)`` float32. A row that sees no other block gives 1.
    """
    unit = unit_means(key_means)
    if unit.shape[2] == 0:
        # Rows that see nothing.
        unit = F.pad(unit, (0, 0, 0, 1))
    batch, heads, _, dim = unit.shape
    prefix = F.pad(unit.cumsum(2), (0, 0, 1, 0))
    own = rows.diagonal_first - 1 if past_only else rows.diagonal_first
    end = torch.minimum(rows.end, rows.diagonal_first) if past_only else rows.end
    end = torch.maximum(end, rows.low)

    def pick(table: Tensor, index: Tensor) -> Tensor:
        index = index.clamp(0, table.shape[2] - 1)[..., None]
        return table.gather(2, index.expand(batch, heads, -1, dim))

    total = pick(prefix, end) - pick(prefix, rows.low)
    count = (end - rows.low).float()
    if rows.has_diagonal:
        inside = (own >= rows.low) & (own < end)
        mine = torch.where(inside[..., None], pick(unit, own), 0)
        others = count - inside.float()
        likeness = (mine * (total - mine)).sum(-1) / others.clamp(min=1)
        return torch.where(others > 0, (1 - likeness).clamp(0, 1), 1.0)
    likeness = (total.square().sum(-1) - count) / (count * (count - 1)).clamp(min=1)
    return torch.where(count > 1, (1 - likeness).clamp(0, 1), 1.0)


@dataclass(frozen=True, eq=False)
class LevelTables:
    """How many tiles the rows of a document take together, by water level.

    Attributes:
        filled: ``(1 or b, 1 or heads, documents, m + 2)`` float32: tiles at level 0, 1, ...
        rising: ``(..., m + 1)`` float32: rows that take one more tile from level m to m + 1.
        visible: ``(1 or b, 1 or heads, documents)`` float32: visible tiles.
    """

    filled: Tensor
    rising: Tensor
    visible: Tensor


def level_tables(forced: Tensor, limit: Tensor, rows: RowRange, max_limit: int) -> LevelTables:
    """Builds the tables of :func:`water_level_budget`, which depend on lengths alone.

    Args:
        forced: Forced tiles per row, integers that broadcast to ``(batch, heads, i)``.
        limit: Forced and candidate tiles per row.
        rows: Visible ranges; its documents are budgeted separately.
        max_limit: An upper bound of ``limit``, m.
    """
    shape = torch.broadcast_shapes(forced.shape, limit.shape, rows.low.shape)
    forced, limit = forced.expand(shape).long(), limit.expand(shape).long()
    allowed = rows.num_allowed.expand(shape)
    document = rows.document.expand(shape)
    tables = (*shape[:2], rows.num_documents)
    device = rows.low.device
    # rising[m]: rows that take one block more when the level rises from m to m + 1, which are those
    # with forced <= m < limit. Counted in sorted keys that keep documents apart. (A scatter_add
    # would do, but torch.compile for CUDA adds up lanes past the end where all indices are equal.)
    width = max_limit + 1
    levels = torch.arange(rows.num_documents * width, device=device)
    levels = levels.expand(*shape[:2], -1).contiguous()
    begun, ended = (
        torch.searchsorted((document * width + x).sort(-1).values, levels, right=True)
        for x in (forced, limit)
    )
    rising = (begun - ended).float().view(*tables, width)
    base, total = (_by_document(x.float(), document, tables) for x in (forced, allowed))
    filled = torch.cat([base[..., None], base[..., None] + rising.cumsum(-1)], -1)
    return LevelTables(filled, rising, total)


def _by_document(x: Tensor, document: Tensor, tables: tuple[int, ...]) -> Tensor:
    if tables[2] == 1:
        return x.sum(-1, keepdim=True)
    return x.new_zeros(tables).scatter_add_(2, document, x)


def water_level_budget(
    keep: Tensor, forced: Tensor, limit: Tensor, rows: RowRange, max_limit: int
) -> Tensor:
    r"""Spreads a share of the visible tiles over the rows as evenly as they can take it.

    If every row had the share κ, the level μ that solves
    :math:`\sum_i \mathrm{clip}(\mu, f_i, c_i) = \kappa \sum_i a_i` (over the rows of a document;
    f forced, c candidates, a visible tiles) would meet it exactly. Each row gets the
    clipped level of its own κ. The level depends on lengths alone, so a row's budget depends
    on no other row's content.

    Args:
        keep: κ, ``(batch, heads, i)`` in [0, 1].
        forced: Forced tiles per row, integers that broadcast to the same shape.
        limit: Forced and candidate tiles per row.
        rows: Visible ranges; its documents are budgeted separately.
        max_limit: An upper bound of ``limit``.

    Returns:
        Real-valued blocks per row ``(batch, heads, i)`` in [forced, limit], differentiable in
        ``keep``.
    """
    tables = level_tables(forced, limit, rows, max_limit)
    filled, rising = tables.filled, tables.rising
    shape = torch.broadcast_shapes(forced.shape, limit.shape, rows.low.shape)
    document, width = rows.document.expand(shape), max_limit + 1
    goal = keep * tables.visible.gather(2, document)
    if rows.num_documents == 1:
        steps = filled[:, :, 0].expand(*goal.shape[:2], -1).contiguous()
        low = torch.searchsorted(steps, goal.detach().contiguous(), right=True) - 1
        low = low.clamp(0, max_limit)
        floor, slope = (
            steps.gather(2, low),
            rising[:, :, 0].expand(*goal.shape[:2], -1).gather(2, low),
        )
    else:
        index = document[..., None].expand(*shape, width + 1)
        steps = filled.gather(2, index)
        low = ((steps <= goal.detach()[..., None]).sum(-1) - 1).clamp(0, max_limit)
        floor = steps.expand(*goal.shape, -1).gather(3, low[..., None])[..., 0]
        slope = rising.gather(2, index[..., :width]).expand(*goal.shape, -1)
        slope = slope.gather(3, low[..., None])[..., 0]
    level = low + torch.where(slope > 0, (goal - floor) / slope.clamp(min=1), 0.0)
    return torch.minimum(torch.maximum(level, forced.float()), limit.float())


def rounding_phases(heads: int, device: torch.device) -> Tensor:
    """What each head adds before it rounds down, int64 ``(heads, 1)`` in units of a block.

    Head h of H adds ``(2 h + 1) / 2 H``: one head alone rounds to the nearest, and of heads with
    equal shares some round up in each row, so that together they leave out as few rows as they can.
    """
    head = torch.arange(heads, device=device)
    return (((2 * head + 1) << FRACTION_BITS) // (2 * heads))[:, None]


def round_budget(budget: Tensor, rows: RowRange) -> Tensor:
    """Rounds to integers so that running sums stay within a block of the exact ones.

    The remainder moves on to later rows of the same document only (never back), so a causal row
    depends on no later one. Each row gets the floor or the ceiling of its share. Heads round up
    in different rows (:func:`rounding_phases`).

    Args:
        budget: ``(batch, heads, i)`` real-valued, not negative.
        rows: For the documents.

    Returns:
        int32 of the same shape.
    """
    phase = rounding_phases(budget.shape[1], budget.device)
    units = (budget.detach().double() * (1 << FRACTION_BITS)).round().long()
    running = F.pad(units.cumsum(-1), (1, 0))
    if rows.num_documents > 1:
        document = rows.document.expand(budget.shape)
        fresh = torch.ones_like(document, dtype=torch.bool)
        fresh[..., 1:] = document[..., 1:] != document[..., :-1]
        position = torch.arange(budget.shape[-1], device=budget.device)
        first = torch.where(fresh, position, 0).cummax(-1).values
        before = running.gather(-1, first)
    else:
        before = torch.zeros_like(units)
    upper = (running[..., 1:] - before + phase) >> FRACTION_BITS
    lower = (running[..., :-1] - before + phase) >> FRACTION_BITS
    return (upper - lower).int()


# Keeps the running sums of one document above those of the documents before it.
_DOCUMENT_STEP = 1 << 40


def share_units(
    keep: Tensor, seen: Tensor, forced: Tensor, limit: Tensor, even: Tensor | None = None
) -> Tensor:
    """What each row may spend, ``min(keep * seen, limit)``, in units of ``2**-16`` blocks.

    Args:
        keep: Share κ of the visible blocks, ``(batch, heads, i)`` in [0, 1].
        seen: Blocks that each row counts as seeing (:func:`seen_blocks`); broadcasts to that shape.
        forced: Forced blocks per row, integers, likewise.
        limit: Forced and candidate blocks per row, likewise.
        even: 0-dim in [0, 1]: so much of what lies above the forced blocks. None: all of it.

    Returns:
        int64 ``(batch, heads, i)``, so that every device adds up alike.
    """
    share = keep.detach().double() * seen
    if even is not None:
        share = even.double() * share + (1 - even.double()) * forced
    share = torch.minimum(share, limit.double())
    return (share * (1 << FRACTION_BITS)).round().long()


def seen_blocks(allowed: Tensor, reach: Tensor | None) -> Tensor:
    """What rows count as seeing: ``max(allowed, reach)`` blocks; without a reach what they see."""
    return allowed if reach is None else torch.maximum(allowed.to(reach.dtype), reach)


def documents_reach(rows: RowRange) -> Tensor:
    """What the last row of each row's document sees, at most :data:`MOST_REACH` blocks.

    Returns:
        ``(1 or b, 1, i)`` float32.
    """

    def compute() -> Tensor:
        allowed = rows.num_allowed
        # Coming from the end, an earlier document stands above all that was before.
        lift = (rows.num_documents - rows.document.expand(allowed.shape)) * _DOCUMENT_STEP
        last = (allowed.long() + lift).flip(-1).cummax(-1).values.flip(-1) - lift
        return last.clamp(max=MOST_REACH).float()

    return rows.remember("reach", compute)


def next_budget(earned: Tensor, given: Tensor, forced: Tensor, limit: Tensor) -> Tensor:
    """The budget of one row from what the rows before it did.

    Args:
        earned: Sum of :func:`share_units` up to this row, ``(batch, heads, 1)``.
        given: Blocks that the rows before it got.
        forced: The row's forced blocks.
        limit: Its forced and candidate blocks.

    Returns:
        Blocks, int64: what was earned and not given (rounded), within [forced, limit].
    """
    whole = (earned + rounding_phases(earned.shape[1], earned.device)) >> FRACTION_BITS
    return torch.minimum(torch.maximum(whole - given, forced.long()), limit.long())


def running_budget(
    keep: Tensor, forced: Tensor, limit: Tensor, rows: RowRange, even: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Budgets of all rows of a causal sequence, equal to one :func:`next_budget` after another.

    :math:`b_i = \max(f_i, \lfloor \sum_{r \le i} \kappa_r a_r + \phi_h \rfloor - \sum_{r < i} b_r)`
    with the head's rounding phase φ: the share κ of the visible blocks is met by every beginning of
    the sequence, once it is long enough to pay for the forced blocks f. With a reach ``R`` a row
    counts as seeing :math:`\max(a_r, R)` blocks, so that early rows get as many as the row that
    sees R, as far as there are so many. Rows whose candidates are fewer than their share do not
    pass the rest on.

    Args:
        keep: κ, ``(batch, heads, i)`` in [0, 1].
        forced: Forced blocks per row, integers that broadcast to the same shape.
        limit: Forced and candidate blocks per row.
        rows: Visible ranges; its documents are budgeted separately.
        even: As in :func:`share_units`; of the whole budgets alone.
        reach: Rows that see fewer blocks count as seeing so many; broadcasts, too. None: no row.

    Returns:
        The real-valued budgets, differentiable in ``keep``, and int32 whole ones, both
        ``(batch, heads, i)``.
    """
    shape = torch.broadcast_shapes(keep.shape, forced.shape, limit.shape, rows.low.shape)
    keep, forced, limit = keep.expand(shape), forced.expand(shape), limit.expand(shape)
    allowed, document = rows.num_allowed.expand(shape), rows.document.expand(shape)
    seen = seen_blocks(allowed, reach)
    exact = torch.minimum(torch.maximum(keep * seen, forced.float()), limit.float())
    earned = _running(share_units(keep, seen, forced, limit, even), document)
    whole = (earned + rounding_phases(shape[1], earned.device)) >> FRACTION_BITS
    demanded = _running(forced.long(), document)
    # given = demanded + the largest surplus so far, which unrolls the recursion.
    lift = document * _DOCUMENT_STEP
    surplus = ((whole - demanded).clamp(min=0) + lift).cummax(-1).values - lift
    given = demanded + surplus
    before = torch.zeros_like(given)
    before[..., 1:] = torch.where(document[..., 1:] == document[..., :-1], given[..., :-1], 0)
    return exact, torch.minimum(given - before, limit.long()).int()


def _running(values: Tensor, document: Tensor) -> Tensor:
    """Running sums that start anew with each document."""
    total = values.cumsum(-1)
    position = torch.arange(values.shape[-1], device=values.device)
    fresh = torch.ones_like(document, dtype=torch.bool)
    fresh[..., 1:] = document[..., 1:] != document[..., :-1]
    first = torch.where(fresh, position, 0).cummax(-1).values
    return total - (total - values).gather(-1, first)


# What a block's expected mass loses with each other head that expects more of it: heads that all
# want one block then cost less than their number, and the budget reaches more rows.
_CLAIMED = math.exp(-1.0)
# Blocks to choose from at which a threshold is a share of the softmaxed scores.
_FEW_OPTIONS = 16.0
# A threshold that no score reaches, whatever the length.
NO_THRESHOLD = 64.0


def blocks_above(
    scores: Tensor,
    scored: Tensor,
    threshold: Tensor,
    most: Tensor,
    weights: Tensor,
    *,
    heads_compete: bool,
) -> Tensor:
    r"""Scored blocks of each row whose softmaxed score reaches a threshold.

    That is :math:`w_h p_j (n / 16)^{1/4} \ge \tau` with n blocks to choose from. The more there
    are, the more of the softmax goes to those that nobody reads: by p alone late rows would get
    less than early ones that need the same.

    Args:
        scores: ``(batch, heads, i, c)``.
        scored: Booleans that broadcast to it: which may be chosen; the softmax is over these.
        threshold: 0-dim, of a row with 16 blocks to choose from.
        most: The most that a row may get, integers that broadcast to ``(batch, heads, i)``.
        weights: w, what a head's mass counts, ``(heads,)``.
        heads_compete: Whether column c is the same block in all heads; a block then counts
            ``e**-n`` times its mass for a head with n others above it.

    Returns:
        int32 ``(batch, heads, i)``. No gradient.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log().view(1, 2, 1, 2)
        >>> count = [torch.ones(2).bool(), torch.tensor(0.3), torch.tensor(2), torch.ones(2)]
        >>> blocks_above(scores, *count, heads_compete=False).tolist()
        [[[1], [1]]]
        >>> blocks_above(scores, *count, heads_compete=True).tolist()
        [[[1], [0]]]
    """
    low = torch.finfo(torch.float32).min
    logits = scores.detach().float().nan_to_num(low, torch.inf, low)
    expected = logits.masked_fill(~scored, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = expected * weights[:, None, None]
    heads = expected.shape[1]
    if heads_compete and heads > 1:
        above = torch.zeros_like(expected)
        for head in range(heads):
            above += expected[:, head : head + 1] > expected
        expected = expected * _CLAIMED**above
    options = scored.sum(-1, keepdim=True).clamp(min=1).float()
    reach = threshold / (options / _FEW_OPTIONS).sqrt().sqrt()
    count = ((expected >= reach) & scored).sum(-1, dtype=torch.int32)
    return torch.minimum(count, most.to(torch.int32))


def most_by_score(keep: Tensor, seen: Tensor, factor: float) -> Tensor:
    """The most scored blocks that scores can win a row: a multiple of its share, rounded up.

    Forced blocks do not count, so that rows that see few blocks can win one.

    Args:
        keep: Share of the visible blocks, 0-dim.
        seen: Blocks that each row counts as seeing.
        factor: Of the share.

    Returns:
        int32.
    """
    # In float64 share times blocks is exact.
    return (keep.double() * factor * seen).ceil().int()


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
    """A block size that leaves something to choose: 16, from 4,096 tokens 32, from 16,384 64.

    Args:
        num_tokens: Length, positive.

    Example:
        >>> [fitting_block_size(n) for n in (512, 2048, 8192, 16384)]
        [16, 16, 32, 64]
    """
    return 16 if num_tokens < 4096 else 32 if num_tokens < 16384 else 64


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
        forced, limit = candidates.counts()
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
