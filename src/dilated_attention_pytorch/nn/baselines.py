"""Selectors that do not learn, and so are what a learned one is compared with.

Fixed patterns follow a rule, distilled ones are what a selector read most often, and training-free
selectors rank by content without parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.config import (
    check_floor,
    check_largest,
    check_sparsity,
    check_types,
    from_plain,
)
from dilated_attention_pytorch.foreign_text import short_repr
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.budget_layer import BudgetLayer, Scored
from dilated_attention_pytorch.nn.budgets import budget_of, threshold_sample
from dilated_attention_pytorch.nn.buffers import ExactBuffers
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs, bound_of, even_budget
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.scoring.tile_mass import (
    antidiagonal_scores,
    mean_pool_scores,
    min_max_scores,
    tile_mass,
)
from dilated_attention_pytorch.selection.budget import round_budget
from dilated_attention_pytorch.selection.threshold import ThresholdSample

# Larger than any distance in blocks, and small enough that float32 tells neighbours apart.
_FAR = float(2**20)


@dataclass(frozen=True, eq=False)
class TileGrid:
    """Where the candidates of a layer lie. All broadcast to ``(batch, heads, i, c)``.

    Attributes:
        distance: ``own block - key block``, negative after the own block.
        position: Key block number counted from the start of the sequence or document.
        head: Head number.
        row: Query block number.
    """

    distance: Tensor
    position: Tensor
    head: Tensor
    row: Tensor


def local_window(grid: TileGrid) -> Tensor:
    """Nearest blocks first: a sliding window (Longformer, arXiv 2004.05150).

    ::

        x . . . . .
        x x . . . .
        . x x . . .
        . . x x . .
    """
    return -grid.distance.abs().float()


def dilated(grid: TileGrid) -> Tensor:
    """Blocks ``≡ head (mod 2^(head mod 3))`` first, nearest first (LongNet, arXiv 2307.02486).

    Each head reads every first, second or fourth block of its segment, shifted per head.
    """
    rate = 2 ** (grid.head % 3)
    on_lattice = grid.position % rate == grid.head % rate
    return _first(on_lattice, grid)


def strided(grid: TileGrid) -> Tensor:
    """Distances that are multiples of a stride first (Sparse Transformer, arXiv 1904.10509).

    The stride is 1, 4, 2 or 8 blocks, by head.
    """
    # Powers by the head's last two bits, as a table of strides would wait for the device.
    low, high = grid.head % 2, grid.head // 2 % 2
    stride = 2 ** (2 * low + high)
    return _first(grid.distance % stride == 0, grid)


def hierarchical(grid: TileGrid) -> Tensor:
    """Distances 1, 2, 4, 8, … first: fine near, coarse far (LogSparse, arXiv 1907.00235)."""
    distance = grid.distance.abs()
    power = (distance > 0) & ((distance & (distance - 1)) == 0)
    return _first(power, grid)


def sink_local(grid: TileGrid) -> Tensor:
    """The first block, then the nearest (StreamingLLM, arXiv 2309.17453)."""
    return torch.where(grid.position == 0, _FAR, -grid.distance.abs().float())


def random(grid: TileGrid) -> Tensor:
    """A fixed pseudo-random order per head and row, the same on every run and device."""
    # An integer hash (the constants are those of a common 32-bit mixer).
    x = (grid.row * 73856093) ^ (grid.position * 19349663) ^ ((grid.head + 1) * 83492791)
    for factor in (0x45D9F3B, 0x45D9F3B):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x & 0xFFFFFF).float() / 2**24


def _first(chosen: Tensor, grid: TileGrid) -> Tensor:
    """Nearest first, the chosen ones before all others."""
    near = -grid.distance.abs().float()
    return torch.where(chosen, near, near - _FAR)


Ranking = Callable[[TileGrid], Tensor]

FIXED_PATTERNS: dict[str, Ranking | None] = {
    "local": local_window,
    "dilated": dilated,
    "strided": strided,
    "hierarchical": hierarchical,
    "sink_local": sink_local,
    "random": random,
    # Every visible block, whatever the budget.
    "dense": None,
}


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


METHODS = ("sink_window", "mean_pool", "antidiagonal", "min_max", "oracle")
BUDGETS = ("fixed", "threshold")


@dataclass(frozen=True, kw_only=True)
class TrainingFreeConfig:
    """Settings of a training-free selector.

    Attributes:
        method: ``"sink_window"``: the nearest blocks; ``"mean_pool"``: dot product of block means
            (MoBA); ``"antidiagonal"``: sampled logits (XAttention); ``"min_max"``: bounds from the
            keys' ranges (Quest); ``"oracle"``: the true tile mass, at the cost of dense attention.
        base_sparsity: Mean sparsity to meet, in [0, 1).
        block_size: Tokens per block.
        budget: ``"fixed"``: the same number of blocks for every head, as even over the rows as
            they can take it; ``"threshold"``: the blocks whose softmaxed score reaches a
            threshold that a calibration finds (:meth:`BlockSparseTrainingFree.set_thresholds`), so
            that heads and rows with spread-out attention keep more.
        threshold_floor: With ``budget="threshold"``: share of its ``"fixed"`` budget that every
            row keeps at least, in [0, 1).
        num_sink_blocks: First blocks, always read.
        num_local_blocks: Blocks before the diagonal one, always read.
        stride: Side of the squares of ``"antidiagonal"``.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range.
    """

    method: str = "antidiagonal"
    base_sparsity: float = 0.9
    block_size: int = 64
    budget: str = "fixed"
    threshold_floor: float = 0.0
    num_sink_blocks: int = 1
    num_local_blocks: int = 0
    stride: int = 8

    def __post_init__(self) -> None:
        """Checks every field."""
        check_types(self)
        check_largest(self)
        for name, valid in (("method", METHODS), ("budget", BUDGETS)):
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name} must be one of {valid}, got {short_repr(getattr(self, name))}."
                )
        if self.method == "sink_window" and self.budget != "fixed":
            raise ValueError("method 'sink_window' has no scores: budget must be 'fixed'.")
        check_sparsity("base_sparsity", self.base_sparsity)
        check_floor(self.threshold_floor, self.budget)
        for name, least in (
            ("block_size", 1), ("num_sink_blocks", 0), ("num_local_blocks", 0), ("stride", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.method == "antidiagonal" and self.block_size % self.stride:
            raise ValueError(f"stride must divide block_size={self.block_size}, got {self.stride}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingFreeConfig:
        """Builds a config from :meth:`to_dict`'s result.

        Raises:
            TypeError: If it is no mapping, or a field has the wrong type.
            ValueError: If a key is unknown, or a field out of range.
        """
        return from_plain(cls, values)


class BlockSparseTrainingFree(BudgetLayer):
    """Block-sparse attention whose blocks a fixed rule ranks by content; has no parameters.

    Candidates, forced blocks, budgets and attention are those of :class:`BlockSparseAdaptive`;
    only the ranking differs.

    Args:
        config: Method, budget and forced blocks.
        num_heads: Query heads; each has a pattern of its own.
        head_dim: Size of a head.
        num_kv_heads: Key and value heads; None: ``num_heads``.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        backend: Of :func:`block_sparse_attention`.

    Example:
        >>> layer = BlockSparseTrainingFree(TrainingFreeConfig(base_sparsity=0.5), 2, 16)
        >>> x = torch.randn(1, 512, 2, 16)
        >>> _, info = layer(x, x, x, is_causal=True, return_pattern=True)
        >>> round(float(info["pattern"].sparsity), 2)
        0.5
    """

    def __init__(
        self,
        config: TrainingFreeConfig,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            segment_lengths=None,
            dilation_rates=None,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            block_size=config.block_size,
            pattern_heads=num_heads,
            num_local_blocks=config.num_local_blocks,
            num_sink_blocks=config.num_sink_blocks,
            scale=scale,
            backend=backend,
        )
        self.config = config
        self.threshold_floor = config.threshold_floor
        self.add_budget(budget_of(config.budget), config.base_sparsity)

    def extra_repr(self) -> str:
        """Shown by ``print(layer)``."""
        return f"{self.config.method!r}, base_sparsity={1 - self.densest:.4g}"

    def score(self, inputs: SelectionInputs) -> Tensor:
        """Scores of all tiles ``(b, num_heads, i, j)`` in float32."""
        config, method = self.config, self.config.method
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        query, key = inputs.query.detach(), inputs.key.detach()
        valid = {"query_valid": inputs.query_valid, "key_valid": inputs.key_valid}
        if method == "mean_pool":
            return mean_pool_scores(query, key, block_size=self.block_size, scale=scale, **valid)
        if method == "min_max":
            return min_max_scores(query, key, block_size=self.block_size, scale=scale, **valid)
        if method == "antidiagonal":
            return antidiagonal_scores(
                query, key, inputs.mask, block_size=self.block_size, scale=scale,
                stride=config.stride, **valid,
            )  # fmt: skip
        if method == "oracle":
            weights = None if inputs.query_valid is None else inputs.query_valid[:, None].float()
            mass = tile_mass(
                query, key, inputs.mask, block_size=self.block_size, scale=scale,
                row_weights=weights,
            )  # fmt: skip
            return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()
        # The nearest blocks: a later block is nearer.
        blocks = torch.arange(inputs.candidates.width, device=query.device, dtype=torch.float32)
        rows = inputs.rows.low.shape[-1]
        return blocks.expand(1, self.num_heads, rows, -1)

    @torch.no_grad()
    def select(self, inputs: SelectionInputs) -> Selection:
        """Ranks by the rule and keeps the best within the budget."""
        kernels = self.budget.calibrated and self.place_unsupported_reason(inputs) is None
        scored = Scored.of(inputs, self.score(inputs), kernels=kernels)
        pattern = self.budget.lists(self, scored)
        if pattern is None:
            count = (self.budget.rows(self, scored).whole - scored.forced).clamp(min=0)
            pattern = inputs.best(scored.scores, count)
        return Selection(pattern)

    def threshold_sample(self, inputs: SelectionInputs) -> ThresholdSample:
        """What a calibration needs of these inputs."""
        return threshold_sample(self, Scored.of(inputs, self.score(inputs)))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = {prefix + name: value for name, value in self.named_buffers(recurse=False)}
        if not any(name in state_dict for name in own):
            # Weights of dense attention, or files of before: the settings stay.
            state_dict = {**state_dict, **own}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
