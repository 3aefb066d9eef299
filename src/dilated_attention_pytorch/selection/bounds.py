"""How many blocks a row can get at most, from lengths alone: nothing waits for a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch

from dilated_attention_pytorch.candidates import build_candidates, row_ranges
from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.selection.budget import water_level_budget


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
    level = water_level_budget(torch.full(shape, keep), forced, limit, rows, width)
    return int((level - forced).max().ceil()) + 1
