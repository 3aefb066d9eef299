"""Counts the tiles that an adapted model computes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer, observe_patterns
from dilated_attention_pytorch.pattern import BlockPattern


class CountTiles:
    """While open, counts kept tiles and those of dense attention, over the sparse layers.

    Args:
        adapted: The model; None counts nothing.
    """

    def __init__(self, adapted: AdaptedModel | None) -> None:
        self._layers = [] if adapted is None else list(adapted.selectors.values())
        self._kept, self._allowed = 0, 0
        self._stack = ExitStack()

    def _add(self, layer: BlockSparseLayer, pattern: BlockPattern) -> None:
        # A pattern that heads or samples share counts once; within a layer all count alike.
        self._kept += int(pattern.kv_num_blocks.sum())
        self._allowed += int(pattern.allowed_tiles.sum())

    def __enter__(self) -> CountTiles:
        self._stack.enter_context(observe_patterns(self._layers, self._add))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def sparsity(self) -> float:
        """``1 - tiles computed / tiles of dense attention``; 0 if nothing was counted."""
        return 1 - self._kept / self._allowed if self._allowed else 0.0
