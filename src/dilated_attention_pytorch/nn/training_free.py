"""BlockSparseTrainingFree: rivals of the learned selector that need no training."""

from __future__ import annotations

from collections.abc import Mapping
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
from dilated_attention_pytorch.nn.budget_layer import BudgetLayer, Scored
from dilated_attention_pytorch.nn.budgets import budget_of, threshold_sample
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs
from dilated_attention_pytorch.scoring.tile_mass import tile_mass
from dilated_attention_pytorch.scoring.training_free import (
    antidiagonal_scores,
    mean_pool_scores,
    min_max_scores,
)
from dilated_attention_pytorch.selection.threshold import ThresholdSample

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
