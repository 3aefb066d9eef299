"""Layers whose patterns do not look at the content: by a rule, or left behind by a selector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.fixed_patterns import FIXED_PATTERNS, TileGrid
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.buffers import ExactBuffers
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs, bound_of, even_budget
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.selection.budget import round_budget


class BlockSparseFixed(BlockSparseLayer):
    """Block-sparse attention with a fixed pattern, at the same budget as an adaptive one.

    Candidates, forced blocks, budget, top-k and attention are those of
    :class:`BlockSparseAdaptive` with ``budget="fixed"``; only the ranking differs.

    Args:
        pattern: A name in ``FIXED_PATTERNS``: ``"local"``, ``"dilated"``, ``"strided"``,
            ``"hierarchical"``, ``"sink_local"``, ``"random"`` or ``"dense"``.
        num_heads: Query heads.
        head_dim: Size of a head.
        base_sparsity: Sparsity to meet; ``"dense"`` ignores no block and must be given 0.
        num_selected_blocks: Blocks per row besides the forced ones, in place of
            ``base_sparsity``.
        segment_lengths: Limits the candidates as in the adaptive layer; None: all visible.
        dilation_rates: With ``segment_lengths``.
        num_kv_heads: Key and value heads; None: ``num_heads``.
        block_size: Tokens per block.
        num_local_blocks: Forced neighbours of the diagonal.
        num_sink_blocks: Forced first blocks.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        backend: Of :func:`block_sparse_attention`.

    Raises:
        ValueError: If the name is unknown or a number is out of range.

    Example:
        >>> import torch
        >>> layer = BlockSparseFixed("local", num_heads=2, head_dim=16, base_sparsity=0.5)
        >>> x = torch.randn(1, 512, 2, 16)
        >>> _, info = layer(x, x, x, return_pattern=True)
        >>> float(info["pattern"].sparsity)
        0.5
    """

    def __init__(
        self,
        pattern: str = "local",
        num_heads: int = 8,
        head_dim: int = 64,
        *,
        base_sparsity: float = 0.9,
        num_selected_blocks: int | None = None,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        num_kv_heads: int | None = None,
        block_size: int = 64,
        num_local_blocks: int = 0,
        num_sink_blocks: int = 0,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        if pattern not in FIXED_PATTERNS:
            raise ValueError(f"pattern must be one of {sorted(FIXED_PATTERNS)}, got {pattern!r}.")
        check_sparsity("base_sparsity", base_sparsity)
        if pattern == "dense" and (base_sparsity != 0 or num_selected_blocks is not None):
            raise ValueError(
                "pattern 'dense' keeps every block: base_sparsity must be 0 and "
                f"num_selected_blocks None, got {base_sparsity} and {num_selected_blocks}."
            )
        for name, value, least in (
            ("block_size", block_size, 1),
            ("num_local_blocks", num_local_blocks, 0),
            ("num_sink_blocks", num_sink_blocks, 0),
            ("num_selected_blocks", num_selected_blocks, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        super().__init__(
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            pattern_heads=num_heads,
            num_local_blocks=num_local_blocks,
            num_sink_blocks=num_sink_blocks,
            scale=scale,
            backend=backend,
        )
        self.pattern = pattern
        self.base_sparsity = base_sparsity
        self.num_selected_blocks = num_selected_blocks

    def extra_repr(self) -> str:
        """Shown by ``print(layer)``."""
        return (
            f"{self.pattern!r}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"base_sparsity={self.base_sparsity}, block_size={self.block_size}"
        )

    def select(self, inputs: SelectionInputs) -> Selection:
        """Ranks by the fixed rule and keeps the best within the budget."""
        candidates, ranking = inputs.candidates, FIXED_PATTERNS[self.pattern]
        shape = torch.broadcast_shapes(
            candidates.scored.shape, (1, self.pattern_heads, 1, 1), (*inputs.rows.low.shape, 1)
        )
        if ranking is None:
            everything = (candidates.scored | candidates.forced).expand(shape)
            width = bound_of(everything.sum(-1), candidates.width)
            return Selection(inputs.pattern(everything, width, complete=True)[0])
        scores = ranking(_grid(inputs, self.pattern_heads)).float().expand(shape)
        if self.num_selected_blocks is None:
            count = even_budget(inputs, scores, self.base_sparsity)
        else:
            count = candidates.scored.sum(-1).clamp(max=self.num_selected_blocks)
        complete = self.num_selected_blocks is None and self.base_sparsity == 0
        return Selection(inputs.best(scores, count, complete=complete))


def _grid(inputs: SelectionInputs, heads: int) -> TileGrid:
    rows, device = inputs.rows, inputs.query.device
    columns = inputs.candidates.indices
    if columns is None:
        columns = torch.arange(inputs.candidates.width, device=device).view(1, 1, 1, -1)
    # Numbers are taken from the start of the document, so packing changes nothing.
    position = columns - rows.low[..., None]
    own = rows.diagonal_first - rows.low
    return TileGrid(
        distance=own[..., None] - position,
        position=position,
        head=torch.arange(heads, device=device).view(1, -1, 1, 1),
        row=own[..., None],
    )


def fixed_pattern(
    name: str,
    q_len: int,
    kv_len: int | None = None,
    *,
    num_heads: int = 1,
    base_sparsity: float = 0.9,
    num_selected_blocks: int | None = None,
    block_size: int = 64,
    causal: bool = False,
    num_local_blocks: int = 0,
    num_sink_blocks: int = 0,
    device: torch.device | str = "cpu",
) -> BlockPattern:
    """Builds a fixed pattern without a layer.

    Args:
        name: A name in ``FIXED_PATTERNS``.
        q_len: Query tokens.
        kv_len: Key tokens; None: ``q_len``.
        num_heads: Heads of the pattern.
        base_sparsity: Sparsity to meet; ignored by ``"dense"``.
        num_selected_blocks: Blocks per row besides the forced ones, in place of ``base_sparsity``.
        block_size: Tokens per block.
        causal: Hide later blocks.
        num_local_blocks: Forced neighbours of the diagonal.
        num_sink_blocks: Forced first blocks.
        device: Where to build it.

    Returns:
        A pattern with batch 1.

    Example:
        >>> float(fixed_pattern("strided", 1024, base_sparsity=0.75).sparsity)
        0.75
    """
    dense = name == "dense"
    layer = BlockSparseFixed(
        name,
        num_heads,
        1,
        base_sparsity=0.0 if dense else base_sparsity,
        num_selected_blocks=None if dense else num_selected_blocks,
        block_size=block_size,
        num_local_blocks=num_local_blocks,
        num_sink_blocks=num_sink_blocks,
    )
    query = torch.zeros(1, q_len, num_heads, 1, dtype=torch.float32, device=device)
    key = query.new_zeros(1, q_len if kv_len is None else kv_len, num_heads, 1)
    _, info = layer(query, key, torch.zeros_like(key), is_causal=causal, return_pattern=True)
    pattern: BlockPattern = info["pattern"]
    return pattern


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
        forced = candidates.forced.sum(-1)
        shape = torch.broadcast_shapes(scores.shape[:3], candidates.scored.shape[:3])
        budget = self.mean_count[:, :i].expand(shape)
        limit = (forced + candidates.scored.sum(-1)).float()
        count = (round_budget(torch.minimum(budget, limit), rows) - forced).clamp(min=0)
        return Selection(inputs.best(scores, count))
