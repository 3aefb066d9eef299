"""Shows every layer's selection inputs while a model runs, densely or as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.analysis.recording import evaluation_mode
from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer, Selection, SelectionInputs
from dilated_attention_pytorch.selection.mass_target import mass_target_probe

# Called with the layer's number, its selector and what the selector would choose by. In a dense run
# it may return scores ``(b, pattern heads, i, j)`` to be taught, in the backward pass, where
# attention went.
Callback = Callable[[int, BlockSparseLayer, SelectionInputs], Tensor | None]


class SelectionObserver(BlockSparseLayer):
    """Stands in for a selector: calls back, and then reads every visible block or its choice.

    Args:
        number: Of the layer.
        selector: What it stands in for.
        callback: See ``Callback``.
        dense: Read every visible block; False: what the selector chooses.
    """

    def __init__(
        self, number: int, selector: BlockSparseLayer, callback: Callback, *, dense: bool
    ) -> None:
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
        self.number, self.callback, self.dense = number, callback, dense
        # In a list it is no submodule, and stays where it was.
        self._selector = [selector]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied or pickled, it is what it stands in for: nobody observes the copy."""
        return _itself, (self._selector[0],)

    def select(self, inputs: SelectionInputs) -> Selection:
        """Calls back, and chooses."""
        selector = self._selector[0]
        scores = self.callback(self.number, selector, inputs)
        if not self.dense:
            return selector.choose(inputs)
        candidates = inputs.candidates
        visible = candidates.scored | candidates.forced
        if scores is None:
            return Selection(self.build_pattern(inputs, visible, candidates.width)[0])
        visible = visible.expand(scores.shape)
        pattern, slots = self.build_pattern(inputs, visible, candidates.width)
        batch, _, rows, _ = scores.shape
        kept = scores.gather(-1, slots)
        probe = mass_target_probe(kept, pattern.slot_used(), 1.0, batch * rows)
        return Selection(pattern, mass_probe=probe)


def _itself(selector: BlockSparseLayer) -> BlockSparseLayer:
    return selector


@contextmanager
def observe_selection(
    adapted: AdaptedModel, callback: Callback, *, dense: bool = True
) -> Iterator[None]:
    """While open, the adapted layers call back before they attend.

    Args:
        adapted: The model.
        callback: See ``Callback``.
        dense: The layers attend to everything; False: to what their selectors choose.
    """
    observers = {
        number: SelectionObserver(number, selector, callback, dense=dense)
        for number, selector in adapted.selectors.items()
    }
    with adapted.replaced(observers):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; gives every module its mode back."""
    with evaluation_mode(model), torch.no_grad():
        yield
