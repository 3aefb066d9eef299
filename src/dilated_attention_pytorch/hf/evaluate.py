"""What sparse attention costs: perplexity, kept mass, speed; beside baselines."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.hf.adapt import AdaptedModel, adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter
from dilated_attention_pytorch.hf.attention import DenseBelow
from dilated_attention_pytorch.hf.calibration import (
    calibrate,
    calibrated_selectors,
    find_calibration_target,
)
from dilated_attention_pytorch.hf.model_folder import check_length, check_vocabulary
from dilated_attention_pytorch.hf.observe import (
    CountTiles,
    evaluating,
    mean_loss,
    measure_kept,
)
from dilated_attention_pytorch.hf.sites import input_device
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.baselines import METHODS, TrainingFreeConfig
from dilated_attention_pytorch.selection.budget import most_sparse
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts
from dilated_attention_pytorch.selection.threshold import ThresholdTable

ADAPTER, ALLOTTED = "adapter", "allotted"
# With the thresholds that it was saved with, as load_adapter gives it.
SAVED = f"{ADAPTER}:saved"
_ANY_LENGTH = 2**40
# A pass of a prefix waits for Python; together they do so once.
_PREFIXES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What to measure.

    Attributes:
        lengths: Tokens per window.
        sparsities: Nominal ones; the measured ones are reported beside.
        tolerance: By how much a budget by thresholds may exceed the nominal sparsity on the
            measured windows. Where it does by more, or falls short, thresholds are calibrated again
            for another target, up to six times; no perplexity has a say in it. None: as calibrated.
        baselines: Training-free selectors to compare with, ``"<method>"`` with an even budget,
            ``"<method>:threshold"`` for a budget by calibrated thresholds, ``"<method>:floor0.5"``
            for thresholds above a floor (``threshold_floor``), or ``"<method>:allotted"`` for
            thresholds whose sparsity differs between layers as the adapter's does
            (:class:`SparsityCosts`). All others have the same sparsity in every layer, as has
            ``"adapter:threshold"``. None: every method, by thresholds above the adapter's floor if
            its budget is thresholds (``"sink_window"`` has no scores, and always an even budget).
        block_size: Tokens per block of the baselines; an adapter brings its own, which must agree.
        windows: Windows per text and length.
        calibration_windows: Windows from the start of the text, not measured on, at which
            thresholds are calibrated; as long as the measured ones.
        kept_mass: Measure it, and the recall of what single queries ask for most
            (:class:`KeptAttention`); costs twice dense attention's logits.
        prefixes: Random places per window at which an adapter that chooses for whole query blocks
            (``query_scope="block"``) also predicts from the prefix alone, each a pass; 0: none.
        repeats: Timed passes per length; 0: no timing.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9)
    tolerance: float | None = 0.005
    baselines: tuple[str, ...] | None = None
    block_size: int = 32
    windows: int = 4
    calibration_windows: int = 2
    kept_mass: bool = True
    prefixes: int = 32
    repeats: int = 3

    def __post_init__(self) -> None:
        """Checks every field."""
        for value in self.sparsities:
            check_sparsity("sparsities", value)
        for name in ("windows", "calibration_windows", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie in (0, 1) or be None, got {self.tolerance}.")
        for name in ("prefixes", "repeats"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not self.lengths or min(self.lengths) < 2 * self.block_size:
            raise ValueError(
                f"lengths must be at least two blocks of {self.block_size} tokens, got "
                f"{self.lengths}: there would be nothing to choose."
            )
        for name in self.baselines or ():
            baseline_config(name, self.block_size, 0.5)


def baseline_config(name: str, block_size: int, sparsity: float) -> TrainingFreeConfig:
    """Settings of a baseline named as in :class:`EvaluationSettings`.

    Raises:
        ValueError: If there is no such method or budget.
    """
    method, _, rule = name.partition(":")
    budget, floor = budget_named(rule or "fixed")
    return TrainingFreeConfig(
        method=method, budget=budget, threshold_floor=floor, block_size=block_size,
        base_sparsity=sparsity,
    )  # fmt: skip


def budget_named(rule: str) -> tuple[str, float]:
    """Budget and ``threshold_floor`` of what follows the colon in a method's name.

    Raises:
        ValueError: If the floor is no number.

    Example:
        >>> budget_named("threshold"), budget_named("floor0.5"), budget_named("allotted")
        (('threshold', 0.0), ('threshold', 0.5), ('threshold', 0.0))
    """
    if rule == ALLOTTED:
        return "threshold", 0.0
    if not rule.startswith("floor"):
        return rule, 0.0
    share = rule.removeprefix("floor")
    try:
        return "threshold", float(share)
    except ValueError as error:
        raise ValueError(f"a floor must be named like 'floor0.5', got {rule!r}.") from error


class Evaluation:
    """Measures a model on texts, densely, with an adapter and with training-free baselines.

    Args:
        model: The pretrained model, not adapted.
        texts: Tokens ``(tokens,)`` by name.
        settings: What to measure.
        adapter: Learned selectors; None: baselines alone.

    Raises:
        TextError: If a text is shorter than a window.
        AdapterError: If the adapter was made for another model.
        ValueError: If the adapter's blocks are of another size, or tokens are not the model's.
    """

    def __init__(
        self,
        model: Any,
        texts: Mapping[str, Tensor],
        settings: EvaluationSettings,
        adapter: SelectorAdapter | None = None,
    ) -> None:
        self.model, self.texts = model, dict(texts)
        self.settings, self.adapter = settings, adapter
        for name, tokens in self.texts.items():
            needed = max(settings.lengths) * (settings.calibration_windows + 1)
            check_length(tokens, needed, f"{name} (with {settings.calibration_windows} windows "
                         "to calibrate on)")  # fmt: skip
            check_vocabulary(model, tokens, name)
        if adapter is not None:
            adapter.check_base(model)
            sizes = {config.block_size for config in adapter.configs.values()}
            if sizes != {settings.block_size}:
                raise ValueError(
                    f"block_size must be the adapter's, {sorted(sizes)}, got {settings.block_size}."
                )
        self._dense: dict[tuple[str, int], dict[str, float]] = {}

    def methods(self) -> list[str]:
        """Names of what is compared with dense attention."""
        baselines = METHODS if self.settings.baselines is None else self.settings.baselines
        if self.adapter is None:
            return list(baselines)
        configs = self.adapter.configs.values()
        if self.settings.baselines is None and {x.budget for x in configs} == {"threshold"}:
            floor = max(config.threshold_floor for config in configs)
            rule = f"floor{floor:g}" if floor else "threshold"
            # sink_window has no scores that a threshold could cut.
            baselines = tuple(m if m == "sink_window" else f"{m}:{rule}" for m in METHODS)
        return [ADAPTER, *baselines]

    def cells(self) -> list[tuple[str, int, str, float]]:
        """All combinations of text, length, method and sparsity, in order.

        And, first, an adapter with thresholds as it was saved: calibrated on another text.
        """
        kinds = [(m, x) for m in self.methods() for x in self.settings.sparsities]
        tables = [] if self.adapter is None else list(self.adapter.thresholds().values())
        if self.adapter is not None and tables and all(tables):
            kinds.insert(0, (SAVED, self.adapter.base_sparsity))
        return [(t, length, *kind) for t in self.texts for length in self.settings.lengths
                for kind in kinds]  # fmt: skip

    def dense(self, text: str, length: int) -> dict[str, float]:
        """Perplexity and speed of the model as it is; measured once."""
        if (text, length) not in self._dense:
            windows = self.windows(text, length)
            self._dense[text, length] = {
                "perplexity": perplexity(self.model, windows),
                "tokens_per_second": self._speed(windows),
            }
        return self._dense[text, length]

    def measure(self, text: str, length: int, method: str, sparsity: float) -> dict[str, Any]:
        """Measures one cell; the values of the row are described in :meth:`rows`.

        Args:
            text: Name of a text.
            length: Tokens per window.
            method: :data:`ADAPTER`, :data:`SAVED` or a baseline, with its budget.
            sparsity: The nominal one.
        """
        dense, windows = self.dense(text, length), self.windows(text, length)
        with self.adapted(text, length, method, sparsity) as (adapted, calibrated):
            target, measured, found = calibrated
            limits = [
                most_sparse(length, x.block_size, x.num_sink_blocks, x.num_local_blocks)
                for x in adapted.selectors.values()
            ]
            row: dict[str, Any] = {
                "text": text,
                "length": length,
                "block_size": self.settings.block_size,
                "method": method,
                "sparsity": sparsity,
                "measured_sparsity": measured,
                "perplexity": found,
                "ratio": found / dense["perplexity"],
                "tokens_per_second": self._speed(windows),
                "most_sparse": sum(limits) / len(limits),
            }
            if target != sparsity:
                row["aim"] = target
            if self.settings.kept_mass:
                kept = measure_kept(adapted, windows[:1, :-1])
                row |= {"kept_mass": kept.mass, "peak_recall": kept.peak_recall}
            if self.settings.prefixes and block_choosers(adapted):
                row |= prefix_losses(adapted, windows, self.settings.prefixes)
        return row

    @contextmanager
    def adapted(
        self, text: str, length: int, method: str, sparsity: float
    ) -> Iterator[tuple[AdaptedModel, tuple[float, float, float]]]:
        """The model as one cell has it, while open; the arguments are :meth:`measure`'s.

        Yields:
            The adapted model, calibrated on the first windows of the text; and the sparsity that
            its thresholds were calibrated for (the nominal one if it has none), the sparsity and
            the perplexity on the measured windows.
        """
        with self._selecting(length, method, sparsity) as adapted:
            yield adapted, self._calibrated(adapted, text, length, method, sparsity)

    def _calibrated(
        self, adapted: AdaptedModel, text: str, length: int, method: str, sparsity: float
    ) -> tuple[float, float, float]:
        """Leaves the model with its thresholds; their target, the measured sparsity, perplexity."""
        s, windows = self.settings, self.windows(text, length)
        sample = self.texts[text][: length * s.calibration_windows]
        found: dict[float, float] = {}
        latest = sparsity

        def calibrate_for(target: float) -> None:
            nonlocal latest
            latest = target
            if method != SAVED:
                calibrate(adapted, sample, target, lengths=(length,), windows=s.calibration_windows)

        def measure(target: float) -> float:
            calibrate_for(target)
            with CountTiles(adapted) as tiles:
                found[target] = perplexity(self.model, windows)
            return tiles.sparsity

        if method == SAVED or s.tolerance is None or not calibrated_selectors(adapted):
            return sparsity, measure(sparsity), found[sparsity]
        target, measured = find_calibration_target(measure, sparsity, s.tolerance)
        if latest != target:
            calibrate_for(target)
        return target, measured, found[target]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measures every cell.

        Yields:
            ``text``, ``length``, ``block_size``, ``method``, ``sparsity``, ``measured_sparsity``,
            ``perplexity``, ``ratio`` (to dense), ``kept_mass``, ``peak_recall`` and
            ``tokens_per_second``;
            ``most_sparse``, the sparsity above which the blocks that are always read leave nothing
            to choose; ``aim``, what thresholds were calibrated for, if it is not ``sparsity``. Of
            adapters with ``query_scope="block"`` also ``prefix_loss``, ``teacher_forced_loss`` and
            ``prefix_positions`` (:func:`prefix_losses`).
        """
        for cell in self.cells():
            yield self.measure(*cell)

    def windows(self, text: str, length: int) -> Tensor:
        """Windows behind those to calibrate on, evenly spread, ``(windows, length + 1)``."""
        tokens = self.texts[text][length * self.settings.calibration_windows :]
        count = min(self.settings.windows, (len(tokens) - 1) // length)
        room = len(tokens) - 1 - length
        starts = [room * n // max(count - 1, 1) for n in range(count)]
        return torch.stack([tokens[s : s + length + 1] for s in starts])

    @contextmanager
    def _selecting(self, length: int, method: str, sparsity: float) -> Iterator[AdaptedModel]:
        name, _, rule = method.partition(":")
        if name == ADAPTER and self.adapter is not None:
            adapter = self.adapter
            if rule and method != SAVED:
                adapter = adapter.with_budget(*budget_named(rule))
                if rule != ALLOTTED:
                    adapter = adapter.with_costs(())
            adapted = adapter.apply(self.model)
        else:
            layers = None if self.adapter is None else self.adapter.configs
            config = baseline_config(method, self.settings.block_size, sparsity)
            adapted = adapt(self.model, config, layers=layers)
            if rule == ALLOTTED:
                adapted.costs = self._costs()
        with adapted:
            if method != SAVED:
                adapted.set_base_sparsity(sparsity, length)
            yield adapted

    def _costs(self) -> tuple[SparsityCosts, ...]:
        if self.adapter is None or not self.adapter.costs:
            raise ValueError(
                f"baselines named ':{ALLOTTED}' need an adapter with costs of its layers, which "
                "`dilated-attention allot` measures."
            )
        return self.adapter.costs

    def _speed(self, windows: Tensor) -> float:
        """Tokens per second of a forward pass without the output layer, by the median time.

        NaN if none was measured, or the clock stood still.
        """
        if not self.settings.repeats:
            return math.nan
        tokens = windows[:1, :-1].to(input_device(self.model)).long()
        times = []
        with evaluating(self.model):
            for _ in range(self.settings.repeats + 1):
                _wait(input_device(self.model))
                start = time.perf_counter()
                self.model.base_model(tokens, use_cache=False)
                _wait(input_device(self.model))
                times.append(time.perf_counter() - start)
        # The first pass warms up.
        seconds = statistics.median(times[1:])
        # A clock may stand still.
        return tokens.shape[1] / seconds if seconds > 0 else math.nan


def measure_speed(
    adapted: AdaptedModel, tokens: Tensor, repeats: int = 3, new_tokens: int = 32
) -> dict[str, float]:
    """Times one prompt and some tokens that go on, densely and sparsely in turns.

    Args:
        adapted: The model.
        tokens: The prompt, ``(length,)``.
        repeats: Timed runs of each kind, behind one that warms up; the median counts.
        new_tokens: Generated one at a time.

    Returns:
        ``length``, and in seconds ``prefill_dense``, ``prefill_sparse``, ``generation_dense`` and
        ``generation_sparse``, the last two per token.
    """
    model, before = adapted.model, adapted.dense_below
    device = input_device(model)
    prompt = tokens[None].to(device).long()
    ways = {"dense": DenseBelow(_ANY_LENGTH, _ANY_LENGTH), "sparse": DenseBelow()}
    times: dict[str, list[float]] = defaultdict(list)
    order = random.Random(0)
    try:
        with evaluating(model):
            for _ in range(repeats + 1):
                for way in order.sample(list(ways), len(ways)):
                    adapted.dense_below = ways[way]
                    clock = [_now(device)]
                    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
                    clock.append(_now(device))
                    for _ in range(new_tokens):
                        model(prompt[:, -1:], past_key_values=cache, use_cache=True)
                    clock.append(_now(device))
                    times[f"prefill_{way}"].append(clock[1] - clock[0])
                    times[f"generation_{way}"].append((clock[2] - clock[1]) / new_tokens)
    finally:
        adapted.dense_below = before
    medians = {name: statistics.median(own[1:]) for name, own in times.items()}
    return {"length": len(tokens), **medians}


def break_even(rows: Sequence[Mapping[str, float]]) -> DenseBelow:
    """From which measured length on sparse attention is faster, at every longer one too.

    Args:
        rows: Of :func:`measure_speed`, one or more.

    Returns:
        The lengths; where it is not faster at the longest one, one token more than that.
    """
    ordered = sorted(rows, key=lambda row: row["length"], reverse=True)
    found = []
    for kind in ("prefill", "generation"):
        first = ordered[0]["length"] + 1
        for row in ordered:
            if row[f"{kind}_sparse"] >= row[f"{kind}_dense"]:
                break
            first = row["length"]
        found.append(int(first))
    return DenseBelow(*found)


def _now(device: torch.device) -> float:
    _wait(device)
    return time.perf_counter()


def block_choosers(adapted: AdaptedModel) -> list[BlockSparseAdaptive]:
    """The selectors whose rows choose for a whole query block (``query_scope="block"``)."""
    return [
        selector
        for selector in adapted.selectors.values()
        if isinstance(selector, BlockSparseAdaptive) and not selector.past
    ]


def prefix_losses(adapted: AdaptedModel, windows: Tensor, positions: int) -> dict[str, float]:
    """Mean loss of the next token at random places, from the prefix alone and in the whole pass.

    Where the rows of a query block choose together (``query_scope="block"``), a pass over a whole
    window chooses with tokens in sight that are still to be predicted, which flatters. A prefix
    ends where its prediction is made. Its thresholds are those of the whole window, so that nothing
    else differs; budgets without thresholds are shared out among the rows of the prefix.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, length + 1)``.
        positions: Of each window, the same in every call.

    Returns:
        ``prefix_loss``, ``teacher_forced_loss`` at the same places, both in nats, and
        ``prefix_positions``, their number.
    """
    length, model = windows.shape[1] - 1, adapted.model
    tables = [
        (selector, table)
        for selector in block_choosers(adapted)
        if selector.budget.calibrated and (table := selector.threshold_table())
    ]
    generator = torch.Generator("cpu").manual_seed(length)
    texts = [window[None].to(input_device(model)).long() for window in windows]
    places = [
        torch.randperm(length, generator=generator, device="cpu")[:positions].tolist()
        for _ in texts
    ]
    whole = [x for pair in zip(texts, places, strict=True) for x in _losses_at(model, *pair)]
    # Short ones with short ones: those of one pass are filled up to the longest.
    prefixes = sorted(
        (
            tokens[0, : place + 2]
            for tokens, own in zip(texts, places, strict=True)
            for place in own
        ),
        key=len,
    )
    alone: list[float] = []
    try:
        for selector, table in tables:
            same = table.at(length)
            selector.set_thresholds(ThresholdTable((1, 2 * length), (same, same)))
        for first in range(0, len(prefixes), _PREFIXES_AT_ONCE):
            alone += _last_losses(model, prefixes[first : first + _PREFIXES_AT_ONCE])
    finally:
        for selector, table in tables:
            selector.set_thresholds(table)
    return {
        "prefix_loss": statistics.fmean(alone),
        "teacher_forced_loss": statistics.fmean(whole),
        "prefix_positions": len(alone),
    }


def _losses_at(model: Any, tokens: Tensor, places: list[int]) -> list[float]:
    """Losses of the tokens behind some places of ``(1, tokens)``, in one pass."""
    first, inputs = min(places), tokens[:, :-1]
    with evaluating(model):
        kept = model(inputs, use_cache=False, logits_to_keep=inputs.shape[1] - first).logits[0]
    logits = kept[[place - first for place in places]].float()
    return F.cross_entropy(logits, tokens[0, 1:][places], reduction="none").tolist()


def _last_losses(model: Any, texts: Sequence[Tensor]) -> list[float]:
    """The loss of the last token of each text, from all before it, in one pass."""
    inputs = pad_sequence([text[:-1] for text in texts], batch_first=True)
    last = torch.tensor([len(text) - 2 for text in texts], dtype=torch.long, device=inputs.device)
    mask = torch.arange(inputs.shape[1], device=inputs.device) <= last[:, None]
    with evaluating(model):
        kept = model(inputs, attention_mask=mask.long(), use_cache=False, logits_to_keep=last)
    # Of each text its own last place.
    logits = kept.logits.float().diagonal(dim1=0, dim2=1).mT
    targets = torch.stack([text[-1] for text in texts])
    return F.cross_entropy(logits, targets, reduction="none").tolist()


def perplexity(model: Any, windows: Tensor) -> float:
    """``exp`` of the mean cross entropy of the next token, one window at a time."""
    return math.exp(mean_loss(model, windows))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settings_from(options: Mapping[str, Any]) -> EvaluationSettings:
    """Settings from a mapping that may hold other keys."""
    names = {f.name for f in fields(EvaluationSettings)}
    return EvaluationSettings(**{k: v for k, v in options.items() if k in names})


def block_size_of(adapter: SelectorAdapter) -> int:
    """The block size that all layers of an adapter share.

    Raises:
        ValueError: If they differ.
    """
    sizes: set[int] = {config.block_size for config in adapter.configs.values()}
    if len(sizes) != 1:
        raise ValueError(f"the adapter's layers must share one block size, got {sorted(sizes)}.")
    return next(iter(sizes))
