"""Rivals of the language-model experiment that are not part of the package."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dilated_attention_pytorch import fixed_pattern
from dilated_attention_pytorch.nn.baselines import BlockSparseTrainingFree, TrainingFreeConfig
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.scoring.summaries import past_windows
from dilated_attention_pytorch.scoring.tile_mass import mean_pool_scores


class MeanPooled(BlockSparseTrainingFree):
    """Chooses by the product of mean-pooled queries and keys; nothing is learned.

    The mean of the queries is that of the window which ends with the block's first token, as with
    ``query_scope="past"``: the mean of the whole block would choose by what is to be predicted.
    """

    def __init__(
        self, num_heads: int, head_dim: int, base_sparsity: float, block_size: int
    ) -> None:
        config = TrainingFreeConfig(
            method="mean_pool", base_sparsity=base_sparsity, block_size=block_size,
            num_local_blocks=1, num_sink_blocks=0,
        )  # fmt: skip
        super().__init__(config, num_heads, head_dim)

    def score(self, inputs: SelectionInputs) -> Tensor:
        """Products of the means ``(b, num_heads, i, j)``."""
        query, valid = past_windows(inputs.query.detach(), self.block_size, None, None)
        return mean_pool_scores(
            query, inputs.key.detach(), block_size=self.block_size, scale=self.head_dim**-0.5,
            query_valid=valid,
        )  # fmt: skip


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

    def sparsity(self, n: int) -> float:
        """Share of the query-key pairs of ``n`` tokens that the window leaves out."""
        width = min(_window_width(n, self.base_sparsity, self.block_size), n)
        return 1 - (n * width - width * (width - 1) / 2) / (n * (n + 1) / 2)

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
