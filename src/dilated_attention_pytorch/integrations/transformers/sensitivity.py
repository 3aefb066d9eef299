"""Measures what sparsity costs in each layer or head of an adapted model, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from torch import Tensor

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.dtypes import check_integers
from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.integrations.transformers.calibrate import (
    threshold_samples,
    thresholds_for,
)
from dilated_attention_pytorch.integrations.transformers.observer import SelectionObserver
from dilated_attention_pytorch.integrations.transformers.prefix import KeptPrefix
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.training_free import BlockSparseTrainingFree
from dilated_attention_pytorch.selection.cost_shares import Unit, mean_of
from dilated_attention_pytorch.selection.threshold import ThresholdSample, ThresholdTable

SPARSITIES = (0.5, 0.7, 0.8, 0.86, 0.9, 0.93, 0.95, 0.96)


def units_of(adapted: AdaptedModel, heads: bool) -> list[Unit]:
    """All adapted layers, or all their heads.

    Raises:
        ValueError: If heads cannot differ, as a layer has no thresholds.
    """
    if not heads:
        return list(adapted.selectors)
    for number, config in adapted.configs.items():
        if config.budget != "threshold":
            raise ValueError(
                f"budget must be 'threshold' for heads to differ, got {config.budget!r} in layer "
                f"{number}."
            )
    return [
        (number, head)
        for number, selector in adapted.selectors.items()
        for head in range(selector.pattern_heads)
    ]


def measure_costs(
    adapted: AdaptedModel,
    windows: Tensor,
    sparsities: Sequence[float] = SPARSITIES,
    *,
    units: Sequence[Unit] | None = None,
    background: float | None = None,
) -> Iterator[tuple[Unit, tuple[float, ...]]]:
    """Loss with one layer or head sparse, above the loss with its layer dense; changes nothing.

    That the costs of all add up is an assumption; ``background`` measures them where they are used.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, length + 1)``, of text that nothing is evaluated on.
        sparsities: At which to measure, ascending.
        units: Layers, or heads as pairs of layer and head, from :func:`units_of`; None: all layers.
            The other heads of a head's layer are dense.
        background: Mean sparsity of all other layers, shared by the costs that the model has
            already. None: the others are dense.

    Yields:
        A layer or head and its costs in nats per token, for :class:`SparsityCosts`.

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
    for unit in list(adapted.selectors) if units is None else units:
        number = unit if isinstance(unit, int) else unit[0]
        selector = adapted.selectors[number]
        with adapted.replaced(others):
            prefix.move_to(number)
        # With a dense background it is the same for all layers.
        if reference is None or (background is not None and reference[0] != number):
            dense = {**others, number: _dense(number, selector)}
            reference = number, _loss(adapted, prefix, dense)
        costs = []
        for sparsity in sparsities:
            goal = sparsity if isinstance(unit, int) else _one_head(selector, unit[1], sparsity)
            own = at_sparsity(selector, goal, samples[number], length)
            costs.append(_loss(adapted, prefix, {**others, number: own}) - reference[1])
        yield unit, tuple(costs)


def at_sparsity(
    selector: BlockSparseLayer,
    sparsity: float | tuple[float, ...],
    samples: Sequence[ThresholdSample],
    length: int,
) -> BlockSparseLayer:
    """A copy of a selector at a sparsity, with thresholds calibrated on samples of a length.

    Args:
        selector: Of one layer.
        sparsity: Of the layer, or of each head.
        samples: Of the layer.
        length: Tokens of the samples.
    """
    own = copy.deepcopy(selector)
    if isinstance(own, BlockSparseAdaptive | BlockSparseTrainingFree):
        own.set_base_sparsity(mean_of(sparsity))
        if own.config.budget == "threshold":
            found = thresholds_for(samples, sparsity)
            own.set_thresholds(ThresholdTable((length,), (found,)))
    return own


def _one_head(selector: BlockSparseLayer, head: int, sparsity: float) -> tuple[float, ...]:
    """The others of the layer read everything."""
    return tuple(sparsity if n == head else 0.0 for n in range(selector.pattern_heads))


def _dense(number: int, selector: BlockSparseLayer) -> SelectionObserver:
    return SelectionObserver(number, selector, lambda *_: None, dense=True)


def _loss(
    adapted: AdaptedModel, prefix: KeptPrefix, selectors: dict[int, BlockSparseLayer]
) -> float:
    with adapted.replaced(selectors):
        return prefix.loss()
