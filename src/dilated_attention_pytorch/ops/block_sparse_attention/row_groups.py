"""Sorts query blocks by how many key blocks they read, so that batches need no padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Some query blocks (rows) that read equally many key blocks.

    Attributes:
        rows: ``(r,)`` int64, places in the flattened ``(b, h, i)``.
        keys: ``(r, c)`` int64, the key blocks they read: places in the flattened ``(b, g, j)``.
        slots: ``(r, c)`` int64, the same tiles' places in the flattened ``kv_indices``.
        shared: Number of the one token mask that the last tile of every row needs, all other
            tiles needing none. None: see ``masked``.
        masked: Row, place in the row and mask number of each tile that needs a token mask, three
            ``(t,)`` int64; None if no tile does, or ``shared`` says all.
        unread: Booleans ``(r, c, size_k)``: key tokens that no query token of the tile sees; None
            if there are none.
    """

    rows: Tensor
    keys: Tensor
    slots: Tensor
    shared: int | None
    masked: tuple[Tensor, Tensor, Tensor] | None
    unread: Tensor | None


@dataclass(frozen=True, eq=False)
class RowGroups:
    """All rows of one call.

    Attributes:
        groups: The rows that read anything, in ascending order of key blocks read.
        empty: Places in the flattened ``(b, h, i)`` of the rows that read nothing.
        hidden: Booleans ``(masks, size_q, size_k)``: the distinct token masks (True: not seen).
            Query tokens past the end see nothing in them.
    """

    groups: list[RowGroup]
    empty: Tensor
    hidden: Tensor


def group_rows(args: Arguments, max_elements: int) -> RowGroups:
    """Lists the tiles to compute, grouped; waits for the device.

    Tiles that the token rule forbids altogether or whose bias is -inf are left out, whatever the
    pattern says: nobody reads them.

    Args:
        args: The call.
        max_elements: Logits in one group, at most (a single row may have more).
    """
    pattern, num_heads, num_kv_heads = args.pattern, args.query.shape[2], args.key.shape[2]
    (size_q, size_k), device = pattern.block_size, pattern.device
    b, p, i, _k = pattern.kv_indices.shape
    used = pattern.slot_used()
    if args.block_bias is not None:
        used = used & (args.block_bias != -torch.inf)
    if not bool(used.any()):
        nothing = torch.empty(0, size_q, size_k, dtype=torch.bool, device=device)
        return RowGroups([], torch.arange(b * num_heads * i, device=device), nothing)
    index = torch.where(used, pattern.kv_indices, 0).long()
    blocks = torch.arange(i, device=device).view(1, 1, i, 1)
    used = used & args.mask.tiles(pattern.block_size, blocks, index)
    code, number, hidden = _token_masks(args, used, index)
    unread = hidden.all(1)

    count = used.sum(-1)
    first_tile = (count.flatten().cumsum(0) - count.flatten()).view(b, p, i)
    tile_slots = used.flatten().nonzero().squeeze(-1)
    kind = _row_kinds(code, used, count, (size_q, size_k))
    # From here on one entry per query head: (b, h, i), flattened.
    num_kinds = size_q + size_k + 2
    per_head = [
        x.repeat_interleave(num_heads // p, 1).flatten()
        for x in (count * num_kinds + kind, first_tile)
    ]
    order = per_head[0].argsort(stable=True)
    tile_keys, group_size = index.flatten(), num_heads // num_kv_heads
    groups, empty, start = [], order[:0], 0
    values, totals = per_head[0].unique(return_counts=True)
    for value, total in zip(values.tolist(), totals.tolist(), strict=True):
        c, row_kind = divmod(value, num_kinds)
        rows, start = order[start : start + total], start + total
        if not c:
            empty = rows
            continue
        for row in rows.split(max(1, max_elements // (size_q * size_k * c))):
            slots = tile_slots[per_head[1][row][:, None] + torch.arange(c, device=device)]
            # (b, h, i) -> (b, g): the heads of a group are neighbours.
            kv_head = row.div(i * group_size, rounding_mode="floor")
            keys = tile_keys[slots] + kv_head[:, None] * pattern.num_key_blocks
            shared, masked, dead = None, None, None
            if 0 < row_kind <= size_q + size_k:
                shared = int(number[slots[0, -1]])
            elif row_kind:
                at = (number[slots] >= 0).nonzero(as_tuple=True)
                masked = (at[0], at[1], number[slots[at]])
                dead = torch.zeros(*slots.shape, size_k, dtype=torch.bool, device=device)
                dead[at] = unread[masked[2]]
            groups.append(RowGroup(row, keys, slots, shared, masked, dead))
    return RowGroups(groups, empty, hidden)


def _row_kinds(code: Tensor, used: Tensor, count: Tensor, size: tuple[int, int]) -> Tensor:
    """How the rows are masked, int64 ``(b, p, i)``.

    0: nowhere. 1 to ``size_q + size_k``: the diagonal runs through the last tile, one number for
    each way to do so. ``size_q + size_k + 1``: otherwise.
    """
    partial = code >= 0
    highest = code.amax(-1)
    last = torch.where(used, torch.arange(used.shape[-1], device=used.device), -1).amax(-1)
    in_last = partial.gather(-1, last.clamp(min=0)[..., None]).squeeze(-1)
    # Rows that see nothing, and keys that nobody sees, take the general path.
    diagonal = highest - size[1]
    simple = (diagonal + size[1] <= size[0]) & ((diagonal <= 0) | (count > 1))
    number = partial.sum(-1)
    kind = torch.where((number == 1) & in_last & simple, 1 + highest, size[0] + size[1] + 1)
    return torch.where(number == 0, 0, kind)


def _token_masks(args: Arguments, used: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluates the token rule for the tiles that it cuts through.

    Args:
        args: The call.
        used: Booleans ``(b, p, i, k)``: tiles to compute.
        index: Their key blocks, int64.

    Returns:
        * ``(b, p, i, k)``: -1 for a tile that needs no mask; where causality alone cuts the tile,
          ``size_k`` plus the key position of its first column as seen from its first row, below
          ``size_q + size_k``; larger numbers elsewhere.
        * For each entry of the flattened ``kv_indices`` the number of its mask, or -1.
        * The masks, as in :class:`RowGroups`.
    """
    size, mask, j = args.pattern.block_size, args.mask, args.pattern.num_key_blocks
    b, _, i, _ = index.shape
    rows = torch.arange(i, device=index.device).view(1, 1, i, 1)
    partial = used & ~mask.full_tiles(size, rows, index)
    sample = torch.arange(b if mask.per_sample else 1, device=index.device).view(-1, 1, 1, 1)
    code = size[0] + size[1] + (sample * i + rows) * j + index
    if mask.causal:
        offset = mask.query_offset
        offset = offset.view(-1, 1, 1, 1) if isinstance(offset, Tensor) else offset
        diagonal = index * size[1] - rows * size[0] - offset + size[1]
        otherwise_full = replace(mask, causal=False).full_tiles(size, rows, index)
        # Query tokens past the end must not count among those that see a key.
        whole = (rows + 1) * size[0] <= mask.q_len
        code = torch.where(otherwise_full & whole, diagonal, code)
    code = torch.where(partial, code, -1)
    distinct, inverse = code[partial].unique(return_inverse=True)
    number = index.new_full((index.numel(),), -1)
    number[partial.flatten()] = inverse
    on_diagonal = distinct < size[0] + size[1]
    row = torch.arange(size[0], device=index.device).view(1, -1, 1)
    column = torch.arange(size[1], device=index.device).view(1, 1, -1)
    hidden = [distinct[on_diagonal].view(-1, 1, 1) - size[1] + column > row]
    tiles = distinct[~on_diagonal] - size[0] - size[1]
    in_sample = tiles.div(i * j, rounding_mode="floor").bincount().tolist()
    for x, of_sample in enumerate(tiles.split(in_sample)):
        rule = mask.sample(x) if mask.per_sample else mask
        hidden.append(~_tile_tokens(rule, size, of_sample % (i * j), j))
    return code, number, torch.cat(hidden)


def _tile_tokens(mask: AttentionMask, size: tuple[int, int], tiles: Tensor, j: int) -> Tensor:
    """The token rule on tiles ``query_block * j + key_block``: ``(tiles, size_q, size_k)``."""
    first_q = tiles.div(j, rounding_mode="floor") * size[0]
    first_k = tiles % j * size[1]
    query = first_q.view(1, -1, 1, 1) + torch.arange(size[0], device=tiles.device).view(1, 1, -1, 1)
    key = first_k.view(1, -1, 1, 1) + torch.arange(size[1], device=tiles.device).view(1, 1, 1, -1)
    return mask.tokens(query, key)[0]
