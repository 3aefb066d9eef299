"""Looks at an adapted model while it runs: what selectors choose by, and how well they choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.analysis import Diagnosis, Recording, record
from dilated_attention_pytorch.analysis.measures import join_measures, measure_selectors
from dilated_attention_pytorch.analysis.recording import evaluation_mode, keeps_peaks
from dilated_attention_pytorch.hf.adapt import AdaptedModel
from dilated_attention_pytorch.hf.model_folder import token_texts
from dilated_attention_pytorch.hf.sites import input_device
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.baselines import BlockSparseTrainingFree
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs, even_budget
from dilated_attention_pytorch.runtime import check_integers
from dilated_attention_pytorch.scoring.tile_mass import tile_mass
from dilated_attention_pytorch.selection.top_k import choose_top_k
from dilated_attention_pytorch.train.monitor import TileCount

# Called with the layer's number, its selector and what the selector would choose by.
Callback = Callable[[int, BlockSparseLayer, SelectionInputs], None]


class SelectionObserver(BlockSparseLayer):
    """Stands in for a selector: calls back, and then reads every visible block or its choice."""

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
        self.callback(self.number, selector, inputs)
        if not self.dense:
            return selector.choose(inputs)
        candidates = inputs.candidates
        visible = candidates.scored | candidates.forced
        return Selection(inputs.pattern(visible, candidates.width)[0])


def _itself(selector: BlockSparseLayer) -> BlockSparseLayer:
    return selector


@contextmanager
def observe_selection(
    adapted: AdaptedModel, callback: Callback, *, dense: bool = True
) -> Iterator[None]:
    """While open, the adapted layers call back before they attend, to everything if ``dense``."""
    observers = {
        number: SelectionObserver(number, selector, callback, dense=dense)
        for number, selector in adapted.selectors.items()
    }
    with adapted.replaced(observers):
        yield


def observe_windows(
    adapted: AdaptedModel, windows: Iterable[Tensor], callback: Callback, *, dense: bool = True
) -> None:
    """Runs the model on windows ``(tokens,)``, one at a time, and calls back for every layer."""
    with evaluating(adapted.model), observe_selection(adapted, callback, dense=dense):
        for window in windows:
            tokens = window[None].to(input_device(adapted.model)).long()
            adapted.model.base_model(tokens, use_cache=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; gives every module its mode back."""
    with evaluation_mode(model), torch.no_grad():
        yield


class CountTiles(TileCount):
    """While open, counts kept tiles and those of dense attention, over the sparse layers."""

    def __init__(self, adapted: AdaptedModel) -> None:
        super().__init__(list(adapted.selectors.values()))

    @property
    def sparsity(self) -> float:
        """``1 - tiles computed / tiles of dense attention``; 0 if nothing was counted."""
        return super().sparsity or 0.0


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
    """Compares every selector's ranking with the model's own attention on windows of tokens."""
    totals = torch.zeros(len(sparsities), 4, dtype=torch.float64, device="cpu")

    def look(number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> None:
        mass, scores = true_mass(selector, inputs), selector_scores(selector, inputs)
        for place, sparsity in enumerate(sparsities):
            totals[place] += _compare(inputs, mass, scores.expand(mass.shape), sparsity)

    observe_windows(adapted, windows, look)
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


@dataclass(frozen=True)
class KeptAttention:
    """How much of the dense model's attention goes to what the selectors choose.

    Attributes:
        mass: Share of the attention that goes to the chosen blocks, in [0, 1]; the mean over
            layers, heads and rows.
        peak_recall: Share of the rows (query blocks, in every layer and head) that choose the far
            block which one of their queries asks for most, in [0, 1]. Far are all blocks but the
            first, the row's own and the one before it, whatever the selector always reads. NaN if
            no row has a far block. Kept mass is a mean that hides what single queries need.
    """

    mass: float
    peak_recall: float


def measure_kept(adapted: AdaptedModel, windows: Tensor) -> KeptAttention:
    """What the selectors choose under their own budgets, against the dense model's attention.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, tokens)``, one document each.
    """
    mass: list[float] = []
    peaks: list[Tensor] = []

    def look(number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> None:
        true = true_mass(selector, inputs)
        pattern = selector.choose(inputs).pattern
        chosen = pattern.to_dense().expand(true.shape)
        mass.append(float(true.masked_fill(~chosen, 0).sum(-1).mean()))
        found = keeps_peaks(inputs.query, inputs.key, inputs.mask, pattern, selector.scale)
        peaks.append(found.flatten().cpu())

    observe_windows(adapted, windows, look)
    return KeptAttention(sum(mass) / len(mass), float(torch.cat(peaks).nanmean()))


# Neither fitting nor tuning lowers a temperature: the one ranks nothing at random, the other keeps
# it at its end.
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
    samples = []
    for sample in recording.samples:
        layers = zip(adapted.selectors, sample.layers, strict=True)
        named = tuple(replace(layer, name=f"layers.{number}") for number, layer in layers)
        samples.append(replace(sample, layers=named))
    return Recording(tuple(samples), source)


def diagnose_adapted(
    adapted: AdaptedModel, windows: Tensor, *, history: Sequence[Mapping[str, Any]] = ()
) -> Diagnosis:
    """Checks the selectors of an adapted model, one window at a time.

    The loss is that of the next token. The base stays in evaluation mode, as it is fitted, and
    its weights need no gradient.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, tokens + 1)``; with two or more, patterns are compared.
        history: Metrics of the training, oldest first. Empty: only the present state is judged.

    Raises:
        TypeError: If ``windows`` does not hold integers.
        ValueError: If no selector learns (``TrainingFreeConfig``).
    """
    check_integers("windows", windows)
    measures = [
        measure_selectors(adapted.model, window[None], lambda _, batch: _loss(adapted, batch))
        for window in windows
    ]
    numbers = {id(selector): number for number, selector in adapted.selectors.items()}
    joined = [
        replace(found, name=f"layers.{numbers[id(found.layer)]}")
        for found in join_measures(measures)
    ]
    return Diagnosis.of(joined, history, _INAPPLICABLE)


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


def next_token_loss(model: Any, batch: Tensor) -> Tensor:
    """Mean cross entropy of ``(batch, tokens + 1)`` tokens, in nats."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def mean_loss(model: Any, windows: Tensor) -> float:
    """:func:`next_token_loss` of ``(windows, tokens + 1)`` in evaluation mode, one at a time."""
    with evaluating(model):
        losses = [
            float(next_token_loss(model, window.to(input_device(model)).long()))
            for window in windows.split(1)
        ]
    return sum(losses) / len(losses)
