"""Counts the tiles that block-sparse layers compute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor

from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer, observe_patterns
from dilated_attention_pytorch.pattern import BlockPattern


class TileCount:
    """While open, counts kept tiles and those of dense attention.

    A pattern that heads or samples share counts once; within a layer all count alike. Counting does
    not wait for the device, reading does.

    Args:
        layers: Whose tiles; none: nothing is counted.
    """

    def __init__(self, layers: Sequence[BlockSparseLayer]) -> None:
        self._layers = layers
        self._kept: list[Tensor] = []
        self._allowed: list[Tensor] = []
        self._stack = ExitStack()

    def _add(self, layer: BlockSparseLayer, pattern: BlockPattern) -> None:
        self._kept.append(pattern.kv_num_blocks.sum())
        self._allowed.append(pattern.allowed_tiles.sum())

    def __enter__(self) -> Self:
        self._stack.enter_context(observe_patterns(self._layers, self._add))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def sparsity(self) -> float | None:
        """``1 - tiles computed / tiles of dense attention``; None if nothing was counted."""
        if not self._kept:
            return None
        return 1 - int(torch.stack(self._kept).sum()) / int(torch.stack(self._allowed).sum())

    @property
    def layer_sparsity(self) -> tuple[float, ...]:
        """The same for every forward pass of a layer, in their order."""
        if not self._kept:
            return ()
        return tuple((1 - torch.stack(self._kept).double() / torch.stack(self._allowed)).tolist())
