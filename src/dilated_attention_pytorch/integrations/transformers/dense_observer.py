"""Runs a model densely and shows every layer's selection inputs on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer, Selection, SelectionInputs

# Called with the layer's number, its selector and what the selector would choose by. It may return
# a mass probe for the pattern of all visible blocks.
DenseCallback = Callable[[int, BlockSparseLayer, SelectionInputs], Tensor | None]


class DenseObserver(BlockSparseLayer):
    """Stands in for a selector: calls back, and reads every visible block.

    Args:
        number: Of the layer.
        selector: What it stands in for.
        callback: See ``DenseCallback``.
    """

    def __init__(self, number: int, selector: BlockSparseLayer, callback: DenseCallback) -> None:
        super().__init__(
            segment_lengths=None,
            dilation_rates=None,
            num_heads=selector.num_heads,
            head_dim=selector.head_dim,
            num_kv_heads=selector.num_kv_heads,
            block_size=selector.block_size,
            pattern_heads=selector.pattern_heads,
            num_local_blocks=selector.num_local_blocks,
            num_sink_blocks=selector.num_sink_blocks,
            scale=selector.scale,
            backend=selector.backend,
        )
        # Not a submodule: it stays where it was.
        self.number, self.callback = number, callback
        self._selector = [selector]

    def select(self, inputs: SelectionInputs) -> Selection:
        """Keeps all that is visible."""
        probe = self.callback(self.number, self._selector[0], inputs)
        candidates = inputs.candidates
        everything = candidates.scored | candidates.forced
        heads = self.pattern_heads if probe is not None else 1
        everything = everything.expand(everything.shape[0], heads, -1, -1)
        if probe is not None:
            everything = everything.expand(probe.shape[0], -1, -1, -1)
        pattern, _ = self.build_pattern(inputs, everything, candidates.width)
        return Selection(pattern, mass_probe=probe)


@contextmanager
def observe_dense(adapted: AdaptedModel, callback: DenseCallback) -> Iterator[None]:
    """While open, the adapted layers attend densely and call back before they do."""
    observers = {
        number: DenseObserver(number, selector, callback)
        for number, selector in adapted.selectors.items()
    }
    with adapted.replaced(observers):
        yield


@contextmanager
def evaluating(adapted: AdaptedModel) -> Iterator[None]:
    """Evaluation mode without gradients; gives every module its mode back."""
    modes = {module: module.training for module in adapted.model.modules()}
    adapted.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
