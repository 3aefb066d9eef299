"""The block of keys at a row's own place, as far as the row's first token sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.nn.block_sparse import SelectionInputs


@dataclass(frozen=True, eq=False)
class OwnBlocks:
    """For every block of queries the key block of its first token, without what comes later.

    Attributes:
        key: ``(batch, i * block_size, num_kv_heads, head_dim)``: block i stands for row i.
        valid: ``(batch, i * block_size)`` booleans: keys that the first token of the row sees.
        rows: ``(1, 1, i, 1)``: the block in ``key`` of every row.
        number: ``(1 or batch, 1, i, 1)``: the key block that it is.
    """

    key: Tensor
    valid: Tensor
    rows: Tensor
    number: Tensor

    @classmethod
    def of(cls, inputs: SelectionInputs, block_size: int) -> OwnBlocks:
        """Takes the keys of a causal call."""
        mask, key = inputs.mask, inputs.key
        rows = torch.arange(ceil_div(mask.q_len, block_size), device=key.device).view(1, 1, -1)
        first = rows * block_size + mask.offset_column()
        number = first.div(block_size, rounding_mode="floor")
        token = number[..., None] * block_size + torch.arange(block_size, device=key.device)
        real = (token <= first[..., None]) & (token >= 0) & (token < mask.kv_len)
        token = token.clamp(0, max(mask.kv_len - 1, 0)).flatten(1).expand(len(key), -1)
        real = real.flatten(1).expand(len(key), -1)
        if not mask.kv_len:
            key = key.new_zeros(len(key), 1, *key.shape[2:])
        elif inputs.key_valid is not None:
            real = real & inputs.key_valid.expand(len(key), -1).gather(1, token)
        own = key.gather(1, token[..., None, None].expand(-1, -1, *key.shape[2:]))
        return cls(own, real, rows[..., None], number[..., None])

    def place(self, scores: Tensor, own: Tensor, numbers: Tensor | None) -> Tensor:
        """Puts the scores of the rows' own blocks in, and leaves later blocks without any.

        Args:
            scores: ``(batch, heads, i, c)``.
            own: ``(batch, heads, i, 1)``.
            numbers: ``(1 or batch, 1 or heads, i, c)`` key blocks of the columns; None: all.
        """
        if numbers is None:
            numbers = torch.arange(scores.shape[-1], device=scores.device)
        scores = torch.where(numbers == self.number, own, scores)
        return torch.where(numbers > self.number, -torch.inf, scores)
