"""Finds the thresholds at which an adapted model meets its sparsity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.integrations.transformers.observer import (
    evaluating,
    observe_selection,
)
from dilated_attention_pytorch.integrations.transformers.offloaded import input_device
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.nn.training_free import BlockSparseTrainingFree
from dilated_attention_pytorch.runtime import check_integers
from dilated_attention_pytorch.selection.threshold import (
    ThresholdSample,
    ThresholdTable,
    calibrate_threshold,
)


def calibrate(
    adapted: AdaptedModel,
    tokens: Tensor,
    sparsity: float,
    *,
    lengths: Sequence[int] | None = None,
    windows: int = 4,
) -> None:
    """Sets the thresholds of every selector with ``budget="threshold"``; does nothing to others.

    Each layer meets its sparsity (:meth:`AdaptedModel.layer_sparsities`) by itself, as a mean over
    its heads, rows and windows. What earlier layers leave out changes what later ones see, so after
    a dense pass the thresholds are found once more with the sparse model itself.

    Args:
        adapted: The model.
        tokens: ``(tokens,)``: a sample of text.
        sparsity: Mean sparsity to meet, in [0, 1). A ``threshold_floor`` goes by the selectors' own
            sparsity (:meth:`AdaptedModel.set_base_sparsity`).
        lengths: Lengths to calibrate at; see :class:`ThresholdTable` for others. None: halves of
            what the text and the model's positions allow, down to 512.
        windows: Windows per length, spread over the text.

    Raises:
        TypeError: If ``tokens`` does not hold integers.
        ValueError: If the text is shorter than the shortest length.
        RuntimeError: If the thresholds are offloaded (``offload_buffers=True``).
    """
    check_sparsity("sparsity", sparsity)
    check_integers("tokens", tokens)
    chosen = calibrated_selectors(adapted)
    if not chosen:
        return
    for selector in chosen.values():
        # Before the work of finding thresholds.
        selector.writable("thresholds")
    if lengths is None:
        lengths = default_lengths(min(len(tokens), adapted.model.config.max_position_embeddings))
    if len(tokens) < min(lengths):
        raise ValueError(
            f"tokens must hold at least {min(lengths)} tokens to calibrate at, got {len(tokens)}."
        )
    lengths = sorted(lengths)
    for dense in (True, False):
        found: dict[int, list[float]] = {number: [] for number in chosen}
        for length in lengths:
            samples = threshold_samples(adapted, spread_windows(tokens, length, windows), dense)
            goals = adapted.layer_sparsities(sparsity, length)
            for number in chosen:
                found[number].append(calibrate_threshold(samples[number], goals[number]))
        for number, selector in chosen.items():
            selector.set_thresholds(ThresholdTable(tuple(lengths), tuple(found[number])))


def calibrated_selectors(
    adapted: AdaptedModel,
) -> dict[int, BlockSparseAdaptive | BlockSparseTrainingFree]:
    """The selectors that :func:`calibrate` sets thresholds of, by layer."""
    return {
        number: selector
        for number, selector in adapted.selectors.items()
        if isinstance(selector, BlockSparseAdaptive | BlockSparseTrainingFree)
        and selector.config.budget == "threshold"
    }


def default_lengths(longest: int) -> list[int]:
    """Halves of a length down to 512 tokens, ascending."""
    out = [longest]
    while out[-1] // 2 >= 512:
        out.append(out[-1] // 2)
    return out[::-1]


def spread_windows(tokens: Tensor, length: int, windows: int) -> Tensor:
    """Windows ``(windows, length)`` spread evenly over a text; fewer where they would be the same.

    Args:
        tokens: ``(tokens,)``, at least ``length``.
        length: Tokens per window.
        windows: How many.
    """
    room = len(tokens) - length
    starts = sorted({room * n // max(windows - 1, 1) for n in range(windows)})
    return torch.stack([tokens[start : start + length] for start in starts])


def threshold_samples(
    adapted: AdaptedModel, windows: Tensor, dense: bool
) -> dict[int, list[ThresholdSample]]:
    """What thresholds are calibrated on, by layer: one sample per window ``(windows, length)``.

    Args:
        adapted: The model.
        windows: Tokens.
        dense: Of dense activations; False: of those with the selectors' own choice.
    """
    samples: dict[int, list[ThresholdSample]] = {number: [] for number in adapted.selectors}

    def look(number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> None:
        if isinstance(selector, BlockSparseAdaptive | BlockSparseTrainingFree):
            samples[number].append(selector.threshold_sample(inputs))

    with evaluating(adapted.model), observe_selection(adapted, look, dense=dense):
        for window in windows.split(1):
            adapted.model.base_model(window.to(input_device(adapted.model)).long(), use_cache=False)
    return samples
