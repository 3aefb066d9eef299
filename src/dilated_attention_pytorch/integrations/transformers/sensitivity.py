"""Measures what sparsity costs in each layer of an adapted model, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from torch import Tensor

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.integrations.transformers.calibrate import (
    threshold_samples,
)
from dilated_attention_pytorch.integrations.transformers.observer import SelectionObserver
from dilated_attention_pytorch.integrations.transformers.prefix import KeptPrefix
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.training_free import BlockSparseTrainingFree
from dilated_attention_pytorch.runtime import check_integers
from dilated_attention_pytorch.selection.threshold import (
    ThresholdSample,
    ThresholdTable,
    calibrate_threshold,
)

SPARSITIES = (0.5, 0.7, 0.8, 0.86, 0.9, 0.93, 0.95, 0.96)


def measure_costs(
    adapted: AdaptedModel,
    windows: Tensor,
    sparsities: Sequence[float] = SPARSITIES,
    *,
    layers: Sequence[int] | None = None,
    background: float | None = None,
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Loss with one layer sparse, above the loss with it dense; changes nothing.

    That the costs of all add up is an assumption; ``background`` measures them where they are used.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, length + 1)``, of text that nothing is evaluated on.
        sparsities: At which to measure, ascending.
        layers: Which to measure; None: all.
        background: Mean sparsity of all other layers, shared by the costs that the model has
            already. None: the others are dense.

    Yields:
        A layer and its costs in nats per token, for :class:`SparsityCosts`.

    Raises:
        TypeError: If ``windows`` does not hold integers.
        ValueError: If a sparsity is not in [0, 1).
    """
    check_integers("windows", windows)
    for value in sparsities:
        check_sparsity("sparsities", value)
    inputs = windows[:, :-1]
    length = inputs.shape[1]
    others: dict[int, BlockSparseLayer] = {
        number: _dense(number, selector) for number, selector in adapted.selectors.items()
    }
    samples = threshold_samples(adapted, inputs, dense=True)
    if background is not None:
        goals = adapted.layer_sparsities(background, length)
        for _ in range(2):
            others = {
                number: at_sparsity(selector, goals[number], samples[number], length)
                for number, selector in adapted.selectors.items()
            }
            with adapted.replaced(others):
                samples = threshold_samples(adapted, inputs, dense=False)
    prefix = KeptPrefix(adapted, windows)
    reference: tuple[int, float] | None = None
    for number in list(adapted.selectors) if layers is None else layers:
        selector = adapted.selectors[number]
        with adapted.replaced(others):
            prefix.move_to(number)
        # With a dense background it is the same for all layers.
        if reference is None or (background is not None and reference[0] != number):
            dense = {**others, number: _dense(number, selector)}
            reference = number, _loss(adapted, prefix, dense)
        costs = []
        for sparsity in sparsities:
            own = at_sparsity(selector, sparsity, samples[number], length)
            costs.append(_loss(adapted, prefix, {**others, number: own}) - reference[1])
        yield number, tuple(costs)


def at_sparsity(
    selector: BlockSparseLayer,
    sparsity: float,
    samples: Sequence[ThresholdSample],
    length: int,
) -> BlockSparseLayer:
    """A copy of a selector at a sparsity, with thresholds calibrated on samples of a length.

    Args:
        selector: Of one layer.
        sparsity: Of the layer.
        samples: Of the layer.
        length: Tokens of the samples.
    """
    own = copy.deepcopy(selector)
    if isinstance(own, BlockSparseAdaptive | BlockSparseTrainingFree):
        own.set_base_sparsity(sparsity)
        if own.config.budget == "threshold":
            found = calibrate_threshold(samples, sparsity)
            own.set_thresholds(ThresholdTable((length,), (found,)))
    return own


def _dense(number: int, selector: BlockSparseLayer) -> SelectionObserver:
    return SelectionObserver(number, selector, lambda *_: None, dense=True)


def _loss(
    adapted: AdaptedModel, prefix: KeptPrefix, selectors: dict[int, BlockSparseLayer]
) -> float:
    with adapted.replaced(selectors):
        return prefix.loss()
