"""BlockSparseDistilled: a fixed pattern that a trained selector left behind."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.nn.block_sparse import (
    BlockSparseLayer,
    Selection,
    SelectionInputs,
)
from dilated_attention_pytorch.nn.exact_buffers import ExactBuffers
from dilated_attention_pytorch.selection.budget import round_budget
from dilated_attention_pytorch.selection.top_k import choose_top_k

# Between tiles that were read equally often the nearer one wins; a frequency over fewer than
# 10,000 samples and 1,000 blocks is never overruled.
_NEARER = 1e-7


class BlockSparseDistilled(ExactBuffers, BlockSparseLayer):
    """Block-sparse attention that reads, at every place, what a selector read there most often.

    Like :class:`BlockSparseFixed` it does not look at the content; its ranking and its budget per
    head and row come from a data set instead of a rule.

    Args:
        frequency: ``(h, i, j)``: share of the samples in which a tile was read; ``h`` is 1,
            ``num_kv_heads`` or ``num_heads``. Shorter sequences use its upper left corner.
        mean_count: ``(h, i)``: mean number of tiles that a row read.
        num_heads: Query heads.
        head_dim: Size of a head.
        num_kv_heads: Key and value heads; None: ``num_heads``.
        block_size: Tokens per block.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        backend: Of :func:`block_sparse_attention`.

    Raises:
        ValueError: If the tables do not fit each other or the heads.

    Example:
        >>> frequency = torch.eye(4)[None] + torch.eye(4).roll(-1, 1)[None]
        >>> layer = BlockSparseDistilled(frequency, torch.full((1, 4), 2.0), num_heads=2,
        ...     head_dim=16, block_size=16)
        >>> x = torch.randn(1, 64, 2, 16)
        >>> _, info = layer(x, x, x, is_causal=True, return_pattern=True)
        >>> info["pattern"].kv_indices[0, 0, 3, :2]
        tensor([2, 3], dtype=torch.int32)
    """

    frequency: Tensor
    mean_count: Tensor

    def __init__(
        self,
        frequency: Tensor,
        mean_count: Tensor,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        block_size: int = 64,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        if frequency.dim() != 3 or mean_count.shape != frequency.shape[:2]:
            raise ValueError(
                "frequency must be (h, i, j) and mean_count (h, i), got "
                f"{tuple(frequency.shape)} and {tuple(mean_count.shape)}."
            )
        if len(frequency) not in (1, num_kv_heads, num_heads):
            raise ValueError(
                f"frequency must have 1, num_kv_heads={num_kv_heads} or num_heads={num_heads} "
                f"heads, got {len(frequency)}."
            )
        super().__init__(
            segment_lengths=None,
            dilation_rates=None,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            pattern_heads=len(frequency),
            num_local_blocks=0,
            num_sink_blocks=0,
            scale=scale,
            backend=backend,
        )
        self.register_buffer("frequency", frequency.float())
        self.register_buffer("mean_count", mean_count.float())

    def extra_repr(self) -> str:
        """Shown by ``print(layer)``."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, block_size={self.block_size}, "
            f"blocks={tuple(self.frequency.shape[1:])}"
        )

    def select(self, inputs: SelectionInputs) -> Selection:
        """Keeps the tiles that were read most often."""
        candidates, rows = inputs.candidates, inputs.rows
        i, j = -(-inputs.mask.q_len // self.block_size), candidates.width
        if i > self.frequency.shape[1] or j > self.frequency.shape[2]:
            raise ValueError(
                f"the patterns were distilled for {tuple(self.frequency.shape[1:])} blocks, got "
                f"{(i, j)}; distill from samples of this length."
            )
        distance = (rows.diagonal_first[..., None] - torch.arange(j, device=rows.low.device)).abs()
        scores = self.frequency[:, :i, :j] - _NEARER * distance
        shape = torch.broadcast_shapes(scores.shape, candidates.scored.shape)
        forced = candidates.forced.sum(-1)
        budget = self.mean_count[:, :i].expand(shape[:3])
        limit = forced + candidates.scored.sum(-1)
        count = (round_budget(torch.minimum(budget, limit.float()), rows) - forced).clamp(min=0)
        chosen = choose_top_k(scores.expand(shape), candidates.scored.expand(shape), count, j)
        kept = chosen | candidates.forced
        width = j
        if kept.device.type == "cpu" and not torch.compiler.is_compiling():
            width = int(kept.sum(-1).max()) if kept.numel() else 0
        return Selection(self.build_pattern(inputs, kept, width)[0])
