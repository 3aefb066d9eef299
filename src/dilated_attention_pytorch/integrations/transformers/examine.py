"""Records and diagnoses an adapted model on windows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dilated_attention_pytorch.analysis import Diagnosis, Recording, record
from dilated_attention_pytorch.analysis.measures import join_measures, measure_selectors
from dilated_attention_pytorch.dtypes import check_integers
from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.integrations.transformers.offloaded import input_device
from dilated_attention_pytorch.integrations.transformers.token_texts import token_texts
from dilated_attention_pytorch.integrations.transformers.tune import next_token_loss

# Neither distilling nor tuning lowers a temperature: the one ranks nothing at random, the other
# keeps it at its end.
_INAPPLICABLE = {
    "temperature": "distill and tune do not anneal: no choice of a trained adapter depends on it"
}


def record_adapted(
    adapted: AdaptedModel, windows: Tensor, tokenizer: Any, *, source: str = ""
) -> Recording:
    """What the selectors of an adapted model choose, and what dense attention would read.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, tokens)``.
        tokenizer: Of the model, for the text of the tokens.
        source: What is recorded, in words.

    Returns:
        One sample per window; layers are named by their numbers.

    Raises:
        TypeError: If ``windows`` does not hold integers.
    """
    check_integers("windows", windows)
    recording = record(
        adapted.model.base_model,
        [
            {"input_ids": window[None].to(input_device(adapted.model)), "use_cache": False}
            for window in windows
        ],
        texts=[token_texts(tokenizer, window.tolist()) for window in windows],
        max_samples=len(windows),
        source=source,
    )
    names = layer_names(adapted)
    samples = [
        replace(
            sample,
            layers=tuple(
                replace(layer, name=name) for layer, name in zip(sample.layers, names, strict=True)
            ),
        )
        for sample in recording.samples
    ]
    return Recording(tuple(samples), source)


def diagnose_adapted(
    adapted: AdaptedModel, windows: Tensor, *, history: Sequence[Mapping[str, Any]] = ()
) -> Diagnosis:
    """Checks the selectors of an adapted model, one window at a time.

    The loss is that of the next token. The base stays in evaluation mode, as it is distilled, and
    its weights need no gradient.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, tokens + 1)``; with two or more, patterns are compared.
        history: See :func:`diagnose`.

    Raises:
        TypeError: If ``windows`` does not hold integers.
        ValueError: If no selector learns (``TrainingFreeConfig``).
    """
    check_integers("windows", windows)
    measures = [
        measure_selectors(adapted.model, window[None], lambda _, batch: _loss(adapted, batch))
        for window in windows
    ]
    names = layer_names(adapted)
    joined = [
        replace(found, name=names[list(adapted.selectors.values()).index(found.layer)])
        for found in join_measures(measures)
    ]
    return Diagnosis.of(joined, history, _INAPPLICABLE)


def layer_names(adapted: AdaptedModel) -> list[str]:
    """Short names of the sparse layers, in order: ``layers.<number>``."""
    return [f"layers.{number}" for number in adapted.selectors]


def _loss(adapted: AdaptedModel, batch: Tensor) -> Tensor:
    """The next token's loss, with gradients to every layer though the base is frozen."""
    model = adapted.model
    if model.training:
        model.eval()
        for selector in adapted.selectors.values():
            selector.train()
    model.enable_input_require_grads()
    try:
        return next_token_loss(model, batch.to(input_device(model)).long())
    finally:
        model.disable_input_require_grads()
