"""How many blocks each row may read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.candidates import RowRange

# Contents move a row's share by no other factors, whatever gain and offset learn.
LEAST_FACTOR, MOST_FACTOR = 1e-3, 2.0

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
    unit = key_means.detach().float().transpose(1, 2)
    unit = F.normalize(unit, dim=-1).nan_to_num(0.0, 0.0, 0.0)
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
