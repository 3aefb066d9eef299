"""Finds the thresholds at which a model meets its sparsity, and fits low-rank scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.hf.adapt import AdaptedModel, Selector
from dilated_attention_pytorch.hf.observe import observe_windows
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.runtime import check_integers
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer
from dilated_attention_pytorch.selection.threshold import (
    ThresholdSample,
    ThresholdTable,
    calibrate_threshold,
)

# Called with how much is done and how much there is.
Report = Callable[[int, int], None]
# Calibrations at most, the first one included.
MOST_TRIES = 7


def find_calibration_target(
    measure: Callable[[float], float], sparsity: float, tolerance: float
) -> tuple[float, float]:
    """Tries targets of a calibration until the measured sparsity is the wanted or little above it.

    Thresholds that are calibrated on some windows leave out more or less on others. At first the
    measured sparsity is taken to follow the target one to one; then targets lie on the line through
    the nearest below and the nearest above. Where forced blocks prevent the sparsity, so that a
    higher target changes nothing, it is missed by as little as can be.

    Args:
        measure: Calibrates for a target and returns the sparsity that comes out.
        sparsity: The wanted one, in [0, 1).
        tolerance: By how much it may be exceeded, positive; it may not be fallen short of.

    Returns:
        The best target that was tried, and the sparsity that came out.

    Example:
        >>> target, found = find_calibration_target(lambda target: target - 0.04, 0.9, 0.005)
        >>> round(target, 4), round(found, 4)
        (0.9425, 0.9025)
    """
    tries: list[tuple[float, float]] = []
    target = sparsity
    while not tries or not 0 <= tries[-1][1] <= tolerance:
        stuck = len(tries) > 1 and tries[-1][1] == tries[-2][1] < 0
        if stuck or len(tries) == MOST_TRIES or any(target == tried for tried, _ in tries):
            break
        tries.append((target, measure(target) - sparsity))
        target = _next(tries, tolerance)
    best = min(tries, key=lambda tried: (tried[1] < 0, abs(tried[1])))
    return best[0], best[1] + sparsity


def _next(tries: list[tuple[float, float]], tolerance: float) -> float:
    """The target at which the excess over the wanted sparsity should be half the tolerance."""
    below = [point for point in tries if point[1] < 0]
    above = [point for point in tries if point[1] >= 0]
    points = tries[-2:]
    if below and above:
        # Of those that miss by as much the ones whose targets lie closest together.
        points = [max(below, key=lambda p: (p[1], p[0])), min(above, key=lambda p: (p[1], p[0]))]
    target, excess = points[-1]
    slope = 1.0
    if len(points) == 2:
        # No target is tried twice.
        (x, low), (y, high) = points
        slope = min(max((high - low) / (y - x), 0.3), 3.0)
    return min(max(target + (tolerance / 2 - excess) / slope, 0.0), 0.999)


def calibrate(
    adapted: AdaptedModel,
    tokens: Tensor,
    sparsity: float,
    *,
    lengths: Sequence[int] | None = None,
    windows: int = 4,
    report: Report | None = None,
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
        lengths: Lengths to calibrate at; thresholds of others lie between or at the ends. None:
            halves of what the text and the model's positions allow, down to 512.
        windows: Windows per length, spread over the text.
        report: Called after each length, twice for all, with how many are done and how many there
            are: many windows take minutes on a CPU. None: nobody is told.

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
        before = 0 if dense else len(lengths)
        found: dict[int, list[float]] = {number: [] for number in chosen}
        for done, length in enumerate(lengths, before + 1):
            samples = threshold_samples(adapted, spread_windows(tokens, length, windows), dense)
            goals = adapted.layer_sparsities(sparsity, length)
            for number in chosen:
                found[number].append(calibrate_threshold(samples[number], goals[number]))
            if report is not None:
                report(done, 2 * len(lengths))
        for number, selector in chosen.items():
            selector.set_thresholds(ThresholdTable(tuple(lengths), tuple(found[number])))


def calibrated_selectors(
    adapted: AdaptedModel,
) -> dict[int, Selector]:
    """The selectors that :func:`calibrate` sets thresholds of, by layer."""
    return {
        number: selector
        for number, selector in adapted.selectors.items()
        if isinstance(selector, Selector) and selector.budget.calibrated
    }


def default_lengths(longest: int) -> list[int]:
    """Halves of a length down to 512 tokens, ascending."""
    out = [longest]
    while out[-1] // 2 >= 512:
        out.append(out[-1] // 2)
    return out[::-1]


def spread_windows(tokens: Tensor, length: int, windows: int) -> Tensor:
    """Windows ``(windows, length)`` spread evenly over a text; fewer where they would repeat."""
    room = len(tokens) - length
    starts = sorted({room * n // max(windows - 1, 1) for n in range(windows)})
    return torch.stack([tokens[start : start + length] for start in starts])


def threshold_samples(
    adapted: AdaptedModel, windows: Tensor, dense: bool
) -> dict[int, list[ThresholdSample]]:
    """What thresholds are calibrated on, by layer: one sample per window ``(windows, length)``.

    Of dense activations, or of those with the selectors' own choice.
    """
    samples: dict[int, list[ThresholdSample]] = {number: [] for number in adapted.selectors}

    def look(number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> None:
        if isinstance(selector, Selector):
            samples[number].append(selector.threshold_sample(inputs))

    observe_windows(adapted, windows, look, dense=dense)
    return samples


# A dense pass over more tokens takes minutes on a CPU.
_LONGEST = 8192


class Moments:
    """Moments of the queries and keys that low-rank scorers choose by, summed over windows.

    Args:
        adapted: The model. Layers with another scorer are left alone.

    Attributes:
        scorers: By layer.
        sums: By layer ``(num_heads, d, d)`` of queries, and ``(num_kv_heads, d, d)`` of keys less
            the mean of their window; float64, on the CPU.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.scorers: dict[int, LowRankScorer] = {
            number: selector.scorer
            for number, selector in adapted.selectors.items()
            if isinstance(selector, BlockSparseAdaptive)
            and isinstance(selector.scorer, LowRankScorer)
        }
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}
        for number, scorer in self.scorers.items():
            dim = scorer.query_map.shape[1]
            query, key = (
                torch.zeros(heads, dim, dim, dtype=torch.float64, device="cpu")
                for heads in (scorer.num_heads, scorer.num_kv_heads)
            )
            self.sums[number] = query, key

    def add(self, number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> None:
        """Adds what a layer's selector would choose by in one window."""
        if number not in self.sums:
            return
        query, key = inputs.query.double(), inputs.key.double()
        key = key - key.mean(1, keepdim=True)
        for total, x in zip(self.sums[number], (query, key), strict=True):
            total += (torch.einsum("bnhd,bnhe->hde", x, x) / x.shape[1]).cpu()

    def fit(self) -> None:
        """Sets the maps of every scorer; how many windows were summed makes no difference."""
        for number, scorer in self.scorers.items():
            query, key = (x.to(scorer.query_map.device) for x in self.sums[number])
            scorer.fit(query, key)


def fit_low_rank(
    adapted: AdaptedModel, tokens: Tensor, *, length: int | None = None, windows: int = 2
) -> None:
    """Sets the maps of every ``scorer="low_rank"`` from dense passes; does nothing to others.

    Takes seconds, needs no gradient, and is all that these scorers need to come close to the true
    tile mass (``docs/log.md``). The command ``distill`` does it, and calibrates.

    Args:
        adapted: The model.
        tokens: ``(tokens,)``: a sample of text.
        length: Tokens per window, at most what the text holds. Rotary positions turn queries and
            keys, so that their moments depend on it: take the longest at which the model is to be
            used, which serves shorter ones, too. None: what the model's positions allow, at most
            8,192.
        windows: Windows, spread over the text.

    Raises:
        TypeError: If ``tokens`` does not hold integers.
        ValueError: If there are no tokens.
    """
    check_integers("tokens", tokens)
    moments = Moments(adapted)
    if not moments.scorers:
        return
    if not len(tokens):
        raise ValueError("tokens must hold text to fit the scorers to, got none.")
    if length is None:
        length = min(adapted.model.config.max_position_embeddings, _LONGEST)
    parts = spread_windows(tokens, min(length, len(tokens)), windows)
    observe_windows(adapted, parts, moments.add)
    moments.fit()
