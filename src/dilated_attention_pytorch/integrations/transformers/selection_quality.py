"""How good a choice of blocks is, measured against the true tile mass."""

from __future__ import annotations

from dataclasses import dataclass

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
from dilated_attention_pytorch.nn.inputs import SelectionInputs, even_budget
from dilated_attention_pytorch.nn.training_free import BlockSparseTrainingFree
from dilated_attention_pytorch.scoring.tile_mass import tile_mass
from dilated_attention_pytorch.selection.top_k import choose_top_k


@dataclass(frozen=True)
class SelectionQuality:
    """Means over layers, heads and rows that had a choice, at one sparsity; NaN if none had one.

    Attributes:
        sparsity: The same number of blocks for every head.
        recall: Share of the blocks with the most mass that the scores rank as high.
        kept_mass: Attention that goes to the kept blocks, forced ones included.
        best_mass: What the best choice of as many blocks would keep.
    """

    sparsity: float
    recall: float
    kept_mass: float
    best_mass: float


def true_mass(selector: BlockSparseLayer, inputs: SelectionInputs) -> Tensor:
    """Where the layer's dense attention goes, ``(b, pattern heads, i, j)``."""
    weights = None if inputs.query_valid is None else inputs.query_valid[:, None].float()
    mass = tile_mass(
        inputs.query, inputs.key, inputs.mask, block_size=selector.block_size,
        scale=selector.scale, row_weights=weights,
    )  # fmt: skip
    if selector.pattern_heads != mass.shape[1]:
        mass = mass.unflatten(1, (selector.pattern_heads, -1)).mean(2)
    return mass


def selector_scores(selector: BlockSparseLayer, inputs: SelectionInputs) -> Tensor:
    """Scores of all tiles of an adaptive or a training-free selector."""
    if isinstance(selector, BlockSparseAdaptive):
        return selector.score(inputs)[0]
    if isinstance(selector, BlockSparseTrainingFree):
        return selector.score(inputs)
    raise TypeError(f"selector must have scores, got {type(selector).__name__}.")


def measure_selection(
    adapted: AdaptedModel, windows: Tensor, sparsities: tuple[float, ...]
) -> list[SelectionQuality]:
    """Compares every selector's ranking with the model's own attention.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, tokens)``.
        sparsities: At each of them.
    """
    totals = torch.zeros(len(sparsities), 4, dtype=torch.float64, device="cpu")

    def look(number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> None:
        mass, scores = true_mass(selector, inputs), selector_scores(selector, inputs)
        for place, sparsity in enumerate(sparsities):
            totals[place] += _compare(inputs, mass, scores.expand(mass.shape), sparsity)

    with evaluating(adapted.model), observe_selection(adapted, look):
        for window in windows.split(1):
            adapted.model.base_model(window.to(input_device(adapted.model)).long(), use_cache=False)
    means = (totals[:, :3] / totals[:, 3:]).tolist()
    return [
        SelectionQuality(sparsity, recall, kept, best)
        for sparsity, (recall, kept, best) in zip(sparsities, means, strict=True)
    ]


def _compare(inputs: SelectionInputs, mass: Tensor, scores: Tensor, sparsity: float) -> Tensor:
    """Sums over rows with a choice of recall, kept and best mass, and their number."""
    scored = inputs.candidates.scored.expand(mass.shape)
    count = even_budget(inputs, mass, sparsity).expand(mass.shape[:3])
    chosen, best = (choose_top_k(x, scored, count, x.shape[-1]) for x in (scores, mass))
    free = (count > 0) & (count < scored.sum(-1))
    forced = mass.masked_fill(~inputs.candidates.forced, 0).sum(-1)
    recall = (chosen & best).sum(-1).to(mass.dtype) / count.clamp(min=1)
    kept, most = (forced + mass.masked_fill(~pick, 0).sum(-1) for pick in (chosen, best))
    rows = torch.stack([recall, kept, most, torch.ones_like(kept)], -1)
    return rows[free].double().sum(0).cpu()


def measure_kept_mass(adapted: AdaptedModel, windows: Tensor) -> float:
    """Attention of the dense model that goes to the blocks that the selectors choose, in [0, 1].

    The mean over layers, heads and rows, under the selectors' own budgets.
    """
    kept: list[float] = []

    def look(number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> None:
        chosen = selector.choose(inputs).pattern.to_dense()
        mass = true_mass(selector, inputs)
        kept.append(float(mass.masked_fill(~chosen, 0).sum(-1).mean()))

    with evaluating(adapted.model), observe_selection(adapted, look):
        for window in windows.split(1):
            adapted.model.base_model(window.to(input_device(adapted.model)).long(), use_cache=False)
    return sum(kept) / len(kept)
