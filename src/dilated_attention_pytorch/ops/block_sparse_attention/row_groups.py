"""Sorts query blocks by how many key blocks they read, so that batches need no padding."""

from __future__ import annotations

from dataclasses import dataclass

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
        masked: Row, place in the row and mask number of each tile that needs a token mask, three
            ``(t,)`` int64; None if no tile does.
        unread: Booleans ``(r, c, size_k)``: key tokens that no query token of the tile sees; None
            if there are none.
    """

    rows: Tensor
    keys: Tensor
    slots: Tensor
    masked: tuple[Tensor, Tensor, Tensor] | None
    unread: Tensor | None


@dataclass(frozen=True, eq=False)
class RowGroups:
    """All rows of one call that read anything.

    Attributes:
        groups: In ascending order of key blocks read.
        hidden: Booleans ``(masks, size_q, size_k)``: the token masks (True: not seen), one for
            each distinct tile that needs one. Heads share them, and so do samples under a rule
            that is the same for all.
    """

    groups: list[RowGroup]
    hidden: Tensor


def group_rows(args: Arguments, max_elements: int) -> RowGroups:
    """Lists the tiles to compute, grouped; waits for the device.

    Tiles that the token rule forbids altogether are left out, whatever the pattern says.

    Args:
        args: The call.
        max_elements: Logits in one group, at most (a single row may have more).
    """
    pattern, num_heads, num_kv_heads = args.pattern, args.query.shape[2], args.key.shape[2]
    (size_q, size_k), device = pattern.block_size, pattern.device
    b, p, i, _ = pattern.kv_indices.shape
    used = pattern.slot_used()
    if not bool(used.any()):
        return RowGroups([], torch.empty(0, size_q, size_k, dtype=torch.bool, device=device))
    index = torch.where(used, pattern.kv_indices, 0).long()
    rows = torch.arange(i, device=device).view(1, 1, i, 1)
    used = used & args.mask.tiles(pattern.block_size, rows, index)
    hidden, mask_number = _token_masks(args, used, index)
    unread = hidden.all(1)
    some_unread = bool(unread.any())

    count = used.sum(-1)
    first_tile = (count.flatten().cumsum(0) - count.flatten()).view(b, p, i)
    tile_slots = used.flatten().nonzero().squeeze(-1)
    # From here on one entry per query head: (b, h, i), flattened.
    count = count.repeat_interleave(num_heads // p, 1).flatten()
    first_tile = first_tile.repeat_interleave(num_heads // p, 1).flatten()
    order = count.argsort(stable=True)
    tile_keys, group_size = index.flatten(), num_heads // num_kv_heads
    groups, start = [], 0
    for c, total in enumerate(count.bincount().tolist()):
        step = max(1, max_elements // (size_q * size_k * max(c, 1)))
        for row in order[start : start + total].split(step) if c and total else ():
            slots = tile_slots[first_tile[row][:, None] + torch.arange(c, device=device)]
            # (b, h, i) -> (b, g): heads lie in consecutive groups.
            kv_head = row.div(i * group_size, rounding_mode="floor")
            keys = tile_keys[slots] + kv_head[:, None] * pattern.num_key_blocks
            number = mask_number[slots]
            at = (number >= 0).nonzero(as_tuple=True)
            masked = (at[0], at[1], number[at]) if at[0].numel() else None
            dead = None
            if masked is not None and some_unread:
                dead = torch.zeros(*slots.shape, size_k, dtype=torch.bool, device=device)
                dead[at] = unread[masked[2]]
            groups.append(RowGroup(row, keys, slots, masked, dead))
        start += total
    return RowGroups(groups, hidden)


def _token_masks(args: Arguments, used: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluates the token rule for the tiles that it cuts through.

    Args:
        args: The call.
        used: Booleans ``(b, p, i, k)``: tiles to compute.
        index: Their key blocks, int64.

    Returns:
        ``hidden`` of :class:`RowGroups`, and for each entry of the flattened ``kv_indices`` the
        number of its mask or -1.
    """
    size, mask, j = args.pattern.block_size, args.mask, args.pattern.num_key_blocks
    b, _, i, _ = index.shape
    rows = torch.arange(i, device=index.device).view(1, 1, i, 1)
    partial = used & ~mask.full_tiles(size, rows, index)
    number = torch.full((index.numel(),), -1, device=index.device)
    sample = torch.arange(b if mask.per_sample else 1, device=index.device).view(-1, 1, 1, 1)
    tile = ((sample * i + rows) * j + index)[partial]
    distinct, inverse = tile.unique(return_inverse=True)
    number[partial.flatten()] = inverse
    if not mask.per_sample:
        return ~_tile_tokens(mask, size, distinct, j), number
    in_sample = distinct.div(i * j, rounding_mode="floor").bincount(minlength=b).tolist()
    parts = [
        ~_tile_tokens(mask.sample(x), size, tiles % (i * j), j)
        for x, tiles in enumerate(distinct.split(in_sample))
        if tiles.numel()
    ]
    if not parts:
        return torch.empty(0, *size, dtype=torch.bool, device=index.device), number
    return torch.cat(parts), number


def _tile_tokens(mask: AttentionMask, size: tuple[int, int], tiles: Tensor, j: int) -> Tensor:
    """The token rule on tiles ``query_block * j + key_block``: ``(tiles, size_q, size_k)``."""
    first_q = tiles.div(j, rounding_mode="floor") * size[0]
    first_k = tiles % j * size[1]
    query = first_q.view(1, -1, 1, 1) + torch.arange(size[0], device=tiles.device).view(1, 1, -1, 1)
    key = first_k.view(1, -1, 1, 1) + torch.arange(size[1], device=tiles.device).view(1, 1, 1, -1)
    return mask.tokens(query, key)[0]
