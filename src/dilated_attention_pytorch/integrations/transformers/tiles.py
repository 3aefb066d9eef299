"""Counts the tiles that an adapted model computes."""

from __future__ import annotations

from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.train.monitor import TileCount


class CountTiles(TileCount):
    """While open, counts kept tiles and those of dense attention, over the sparse layers.

    Args:
        adapted: The model; None counts nothing.
    """

    def __init__(self, adapted: AdaptedModel | None) -> None:
        super().__init__([] if adapted is None else list(adapted.selectors.values()))

    @property
    def sparsity(self) -> float:
        """``1 - tiles computed / tiles of dense attention``; 0 if nothing was counted."""
        return super().sparsity or 0.0
