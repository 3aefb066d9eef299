"""Starts low-rank scorers where a frozen model's own queries and keys put them."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.integrations.transformers.observer import (
    evaluating,
    observe_selection,
)
from dilated_attention_pytorch.integrations.transformers.offloaded import input_device
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.runtime import check_integers
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer

# A dense pass over more tokens takes minutes on a CPU.
_LONGEST = 8192


def fit_low_rank(
    adapted: AdaptedModel, tokens: Tensor, *, length: int | None = None, windows: int = 2
) -> None:
    """Sets the maps of every ``scorer="low_rank"`` from dense passes; does nothing to others.

    Takes seconds, needs no gradient, and is all that these scorers need to come close to the true
    tile mass (``docs/log.md``); distillation starts from there.

    Args:
        adapted: The model.
        tokens: ``(tokens,)``: a sample of text.
        length: Tokens per window, at most what the text holds. Rotary positions turn queries and
            keys, so that their moments depend on it: take the longest at which the model is to be
            used. None: what the model's positions allow, at most 8,192.
        windows: Windows, spread over the text.

    Raises:
        TypeError: If ``tokens`` does not hold integers.
        ValueError: If there are no tokens.
    """
    check_integers("tokens", tokens)
    scorers = {
        number: selector.scorer
        for number, selector in adapted.selectors.items()
        if isinstance(selector, BlockSparseAdaptive) and isinstance(selector.scorer, LowRankScorer)
    }
    if not scorers:
        return
    if not len(tokens):
        raise ValueError("tokens must hold text to fit the scorers to, got none.")
    sums: dict[int, tuple[Tensor, Tensor]] = {}

    def look(number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> None:
        query, key = inputs.query.double(), inputs.key.double()
        key = key - key.mean(1, keepdim=True)
        q, k = (torch.einsum("bnhd,bnhe->hde", x, x) / x.shape[1] for x in (query, key))
        before = sums.get(number)
        sums[number] = (q, k) if before is None else (before[0] + q, before[1] + k)

    if length is None:
        length = min(adapted.model.config.max_position_embeddings, _LONGEST)
    length = min(length, len(tokens))
    room = len(tokens) - length
    with evaluating(adapted.model), observe_selection(adapted, look):
        for start in sorted({room * n // max(windows - 1, 1) for n in range(windows)}):
            window = tokens[None, start : start + length].to(input_device(adapted.model)).long()
            adapted.model.base_model(window, use_cache=False)
    for number, scorer in scorers.items():
        scorer.fit(*sums[number])
