"""Rivals of the language-model experiment that are not part of the package."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dilated_attention_pytorch import block_summaries, fixed_pattern
from dilated_attention_pytorch.nn.block_sparse import (
    BlockSparseLayer,
    Selection,
    SelectionInputs,
)
from dilated_attention_pytorch.selection.budget import round_budget, water_level_budget
from dilated_attention_pytorch.selection.top_k import choose_top_k


class MeanPooled(BlockSparseLayer):
    """Chooses by the product of mean-pooled queries and keys; nothing is learned.

    The query block's mean sees the whole block, so its choice is not strictly causal: an advantage
    over layers with ``query_scope="past"``.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, base_sparsity: float, **sizes: Any
    ) -> None:
        super().__init__(
            segment_lengths=None, dilation_rates=None, num_heads=num_heads, head_dim=head_dim,
            num_kv_heads=None, pattern_heads=num_heads, scale=None, backend="auto", **sizes,
        )  # fmt: skip
        self.base_sparsity = base_sparsity

    @torch.no_grad()
    def select(self, inputs: SelectionInputs) -> Selection:
        """Keeps the best products within the budget of a fixed pattern."""
        candidates, rows = inputs.candidates, inputs.rows
        q = block_summaries(inputs.query, self.block_size, pooling=("mean",))
        k = block_summaries(inputs.key, self.block_size, pooling=("mean",))
        scores = q.float().transpose(1, 2) @ k.float().transpose(1, 2).transpose(-1, -2)
        shape = scores.shape
        forced = candidates.forced.sum(-1)
        limit = (forced + candidates.scored.sum(-1)).expand(shape[:3])
        keep = torch.full(shape[:3], 1 - self.base_sparsity, device=scores.device)
        exact = water_level_budget(keep, forced, limit, rows, candidates.width)
        count = (round_budget(exact, rows) - forced).clamp(min=0)
        scored = candidates.scored.expand(shape)
        chosen = choose_top_k(scores, scored, count, candidates.width)
        chosen = chosen | candidates.forced
        width = int(chosen.sum(-1).max())
        return Selection(self.build_pattern(inputs, chosen, width)[0])


class FlexWindow(nn.Module):
    """A causal sliding window run by PyTorch's FlexAttention.

    Args:
        base_sparsity: The window is as wide as the widest row of the ``"local"`` pattern at this
            sparsity.
        block_size: Of that pattern.
    """

    def __init__(self, *, base_sparsity: float, block_size: int) -> None:
        super().__init__()
        self.base_sparsity, self.block_size = base_sparsity, block_size

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
        """``(batch, n, heads, head_dim)``; always causal."""
        assert is_causal
        n = query.shape[1]
        width = _window_width(n, self.base_sparsity, self.block_size)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if query.is_cuda:
            out = _compiled()(q, k, v, block_mask=_window_mask(n, width, str(query.device)))
        else:
            # FlexAttention has no backward pass on the CPU.
            place = torch.arange(n)
            distance = place[:, None] - place
            out = F.scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance < width))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)


@lru_cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


@lru_cache
def _window_width(n: int, base_sparsity: float, block_size: int) -> int:
    local = fixed_pattern(
        "local", n, base_sparsity=base_sparsity, block_size=block_size, causal=True
    )
    return int(local.kv_num_blocks.max()) * block_size


@lru_cache
def _window_mask(n: int, width: int, device: str) -> BlockMask:
    def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < width)

    return create_block_mask(window, None, None, n, n, device=device)
