"""Selectors of a pretrained model: fitted to its queries and keys, or tuned end to end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.config import (
    DISTILLED,
    AdaptiveConfig,
    check_largest,
    check_types,
    from_plain,
)
from dilated_attention_pytorch.files import replaced_folder
from dilated_attention_pytorch.hf.adapt import AdaptedModel, adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter, save_adapter
from dilated_attention_pytorch.hf.attention import SELECTOR
from dilated_attention_pytorch.hf.calibration import (
    Moments,
    Report,
    calibrate,
    default_lengths,
    fit_low_rank,
    spread_windows,
)
from dilated_attention_pytorch.hf.model_folder import TokenText, add_lora, seal_folder
from dilated_attention_pytorch.hf.observe import (
    CountTiles,
    evaluating,
    mean_loss,
    measure_selection,
    next_token_loss,
    observe_selection,
)
from dilated_attention_pytorch.hf.sites import input_device
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.tasks.text import TextWindows, validation_windows
from dilated_attention_pytorch.train.checkpoint import check_form, check_training_state
from dilated_attention_pytorch.train.language_model import TrainingError, check_device
from dilated_attention_pytorch.train.trainer import parameter_groups

DTYPES = ("float32", "bfloat16")
TRAINED = ("selectors", "lora", "all")
ATTENTION = ("sparse", "dense")
# Folders of what was made.
ADAPTER_NAME, LORA_NAME, MODEL_NAME = "adapter", "lora", "model"
# Tokens of a window whose loss is taken: logits of all fill the memory where windows are long.
_LOSS_PLACES = 1024


def distilled_config(**changes: Any) -> AdaptiveConfig:
    """The selector for frozen queries and keys: low-rank scores, blocks of 32, thresholds.

    Every row keeps eight tenths of an even budget in any case, its best blocks (with
    ``query_scope="block"``): where few blocks are left, thresholds alone starve rows. A quarter
    of an even budget goes to blocks that one query needs (``peak_share``).

    On frozen features what reads them is the bottleneck. Summaries of blocks keep nearly as much
    attention mass as the best choice and still cost far more perplexity: they miss sharp matches
    between single tokens, which projected tokens show (``docs/log.md``). With
    ``query_scope="past"`` generation with a cache chooses once per block of tokens and gives the
    tokens of generation without one; with ``"block"`` it reads the cached keys at every
    ``query_stride``-th token.

    Args:
        **changes: Other fields of :class:`AdaptiveConfig`.
    """
    settings = {**DISTILLED, **changes}
    calibrated = settings["budget"] == "threshold"
    if not calibrated or settings.get("query_scope") == "past":
        settings["threshold_floor"] = changes.get("threshold_floor", 0.0)
    if not calibrated or settings["scorer"] != "low_rank":
        settings["peak_share"] = changes.get("peak_share", 0.0)
    return AdaptiveConfig.from_dict(settings)


@dataclass(frozen=True, kw_only=True)
class PretrainedRun:
    """What the result of either depends on, beside the model and the text.

    Attributes:
        config: Settings of the selectors.
        layers: Layers to make sparse; None: all without a sliding window.
        seq_len: Tokens per window: the longest length of use, which serves all shorter ones.
        validation_windows: Held-out windows to measure on.
        device: Where to compute.
        dtype: ``"float32"``, or ``"bfloat16"``: autocast.
    """

    config: AdaptiveConfig = field(default_factory=distilled_config)
    layers: tuple[int, ...] | None = None
    seq_len: int = 2048
    validation_windows: int = 2
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks every field."""
        check_types(self)
        check_largest(self)
        self.check_positive("seq_len", "validation_windows")
        if self.seq_len < 2 * self.config.block_size:
            raise ValueError(
                f"seq_len must be at least two blocks of {self.config.block_size} tokens, got "
                f"{self.seq_len}: there would be nothing to choose."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}.")
        check_device(self.device)

    def check_positive(self, *names: str) -> None:
        """Raises ValueError unless these fields are at least 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["config"] = self.config.to_dict()
        out["layers"] = None if self.layers is None else list(self.layers)
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a run from :meth:`to_dict`'s result.

        Raises:
            KeyError, TypeError or ValueError: If anything is missing, or of the wrong type.
        """
        return from_plain(cls, values, config=AdaptiveConfig.from_dict(values["config"]))


class PretrainedTraining:
    """Finds the selectors of a pretrained model, step by step.

    On one machine and with as many threads, a run that was stopped and loaded again gives bit for
    bit what an uninterrupted one gives (on a GPU only if its kernels are deterministic).

    Args:
        run: What to do.
        model: The model, not adapted, on the run's device.
        text: Tokens.
    """

    run: Any
    adapted: AdaptedModel

    def __init__(self, run: PretrainedRun, model: Any, text: TokenText) -> None:
        self.run, self.model, self.tokens = run, model, text.train
        self.validation = validation_windows(text.validation, run.seq_len, run.validation_windows)
        self.step_count, self.seconds = 0, 0.0

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return bool(self.step_count >= self.run.steps)

    def save_selectors(self, folder: Path, sparsity: float, report: Report | None) -> None:
        """Calibrates the thresholds at all lengths and writes ``adapter``."""
        self.calibrate(sparsity, default_lengths(self.run.seq_len), report)
        save_adapter(self.adapted, folder / ADAPTER_NAME)

    def calibrate(
        self, sparsity: float, lengths: Sequence[int], report: Report | None = None
    ) -> None:
        """Sets the thresholds for a sparsity."""
        with self.autocast():
            # Spread over the whole text: thresholds of code miss the sparsity on prose.
            calibrate(self.adapted, self.tokens, sparsity, lengths=lengths, report=report)

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        kind = torch.device(self.run.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.run.dtype == "bfloat16")


@dataclass(frozen=True, kw_only=True)
class FitRun(PretrainedRun):
    """Everything that a fit's result depends on, beside the model and the text.

    Attributes:
        windows: Windows of ``seq_len`` tokens, spread over the text, to take moments from.
    """

    windows: int = 2
    # One window is a step.
    batch_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        self.check_positive("windows")
        if self.config.scorer != "low_rank":
            raise ValueError(
                "scorer must be 'low_rank', whose maps follow from queries and keys, got "
                f"{self.config.scorer!r}: dilated-attention tune trains the others."
            )

    @property
    def steps(self) -> int:
        """As many as windows."""
        return self.windows


class Fitting(PretrainedTraining):
    """Fits the selectors of a frozen model as :func:`fit_low_rank` does, one window a step.

    The maps are set after the last window.
    """

    run: FitRun

    def __init__(self, run: FitRun, model: Any, text: TokenText) -> None:
        self.windows = spread_windows(text.train, run.seq_len, run.windows)
        # A short text has fewer that differ.
        super().__init__(dataclasses.replace(run, windows=len(self.windows)), model, text)
        self.adapted = adapt(model, run.config, layers=run.layers).freeze_base()
        self.moments = Moments(self.adapted)

    def trained(self) -> list[nn.Parameter]:
        """All that is fitted."""
        return self.adapted.selector_parameters()

    def step(self) -> dict[str, float]:
        """Adds one window's moments; returns ``"loss"``, the model's own there, and ``"seconds"``.

        The loss is that of the next token in nats, at up to 1,024 places: it says whether the text
        suits the model.

        Raises:
            TrainingError: If the loss is not finite.
        """
        start = time.perf_counter()
        window = self.windows[self.step_count].to(input_device(self.model)).long()
        stride = math.ceil((len(window) - 1) / _LOSS_PLACES)
        places = torch.arange(0, len(window) - 1, stride, device=window.device)
        with (
            self.autocast(),
            evaluating(self.model),
            observe_selection(self.adapted, self.moments.add),
        ):
            logits = self.model(window[None], use_cache=False, logits_to_keep=places).logits[0]
        target = window[places + 1].to(logits.device)
        loss = float(F.cross_entropy(logits.float(), target))
        if not math.isfinite(loss):
            raise TrainingError(
                f"the model's own loss on window {self.step_count + 1} is {loss}: its weights are "
                "damaged, or the dtype is too narrow for it."
            )
        self.step_count += 1
        if self.done:
            self.moments.fit()
        seconds = max(time.perf_counter() - start, 0.0)
        self.seconds += seconds
        return {"loss": loss, "seconds": seconds}

    def validate(self) -> dict[str, float]:
        """Recall of the true top blocks and kept mass on the held-out windows, once fitted."""
        if not self.done:
            return {}
        with self.autocast():
            qualities = measure_selection(self.adapted, self.validation[:, :-1], (0.5, 0.8, 0.9))
        return {
            f"{name}_{quality.sparsity:g}": getattr(quality, name)
            for quality in qualities
            for name in ("recall", "kept_mass", "best_mass")
            # Where the forced blocks fill the budget nothing was chosen.
            if not math.isnan(quality.recall)
        }

    def save(self, folder: Path, report: Report | None = None) -> None:
        """Calibrates the thresholds for the configured sparsity and writes ``adapter``."""
        self.save_selectors(folder, self.run.config.base_sparsity, report)

    def state_dict(self) -> dict[str, Any]:
        """Moments, and how far the windows were read: the maps follow from them."""
        return {
            "step_count": self.step_count,
            "seconds": self.seconds,
            "moments": {str(number): list(sums) for number, sums in self.moments.sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`'s result, of the same run, model and text.

        Raises:
            CheckpointError: If it is another run's; nothing has changed then.
        """
        check_form("training", self.state_dict(), state)
        for number, sums in self.moments.sums.items():
            for own, saved in zip(sums, state["moments"][str(number)], strict=True):
                own.copy_(saved)
        self.step_count, self.seconds = state["step_count"], max(state["seconds"], 0.0)
        if self.done:
            self.moments.fit()


@dataclass(frozen=True, kw_only=True)
class TuneRun(PretrainedRun):
    """Everything that a tuning's result depends on, beside the model and the text.

    Attributes:
        batch_size: Windows per step.
        steps: Optimiser steps.
        learning_rate: Peak of the selectors' rate, reached after a twentieth of the steps, falling
            by a cosine to 5 %.
        weight_decay: Of AdamW; gains, offsets and temperatures do not decay.
        seed: Of the selectors' weights and of the data order.
        train: ``"selectors"`` alone on a frozen base; ``"lora"``: low-rank changes of all
            projections beside them (through peft); ``"all"``: all weights.
        attention: ``"sparse"``; ``"dense"`` is the baseline without selectors.
        adapter: Folder of the selectors to start from; None: untrained ones, low-rank ones fitted.
        base_sparsity: Sparsity to tune for.
        base_learning_rate: Peak rate of LoRA or of the model's weights.
        lora_rank: Rank of the changes.
        sparsity_warmup: Share of the steps over which the blocks fall from all to the sparsity;
            with thresholds, which start calibrated, there is no warm-up.
        calibrate_every: Steps between two calibrations of thresholds.
        selector_every: The selectors learn in the first of so many steps, where scores carry a
            gradient and random blocks are read beside the chosen ones. In the others, which are
            several times as fast, weights see what evaluation sees: the selectors' own choice, by
            the fused kernels where they run. With ``train="selectors"`` they learn in every step.
    """

    batch_size: int = 1
    steps: int = 300
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    seed: int = 0
    train: str = "lora"
    attention: str = "sparse"
    adapter: str | None = None
    base_sparsity: float = 0.9
    base_learning_rate: float = 1e-4
    lora_rank: int = 16
    sparsity_warmup: float = 0.1
    calibrate_every: int = 50
    selector_every: int = 8

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        self.check_positive("batch_size", "steps", "lora_rank", "calibrate_every", "selector_every")
        for name in ("learning_rate", "base_learning_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        for name, valid in (("train", TRAINED), ("attention", ATTENTION)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {valid}, got {getattr(self, name)!r}.")
        if self.attention == "dense" and (self.train == "selectors" or self.adapter is not None):
            raise ValueError(
                "attention='dense' has no selectors: train must be 'lora' or 'all' and adapter "
                f"None, got {self.train!r} and {self.adapter!r}."
            )
        if not 0 <= self.sparsity_warmup <= 1:
            raise ValueError(f"sparsity_warmup must lie in [0, 1], got {self.sparsity_warmup}.")

    def selectors_learn(self, step: int) -> bool:
        """Whether the selectors learn in a step, counted from 0."""
        return self.train == "selectors" or step % self.selector_every == 0


class Tuning(PretrainedTraining):
    """Trains selectors, and LoRA or all weights, on the next token.

    The selectors learn from the attention itself (``AdaptiveConfig.estimator``), the rest from the
    loss. With LoRA ``model`` stays the base model; its layers hold the low-rank changes. With
    ``attention="dense"`` ``adapted`` has no selectors.
    """

    run: TuneRun

    def __init__(self, run: TuneRun, model: Any, text: TokenText) -> None:
        super().__init__(run, model, text)
        torch.manual_seed(run.seed)
        self.windows = TextWindows(text.train, run.seq_len, run.seed)
        # Groups of parameters with the peaks of their learning rates.
        self.adapted, self.groups = self.prepare()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, weight_decay=run.weight_decay, groups=self.groups),
            betas=(0.9, 0.98),
            # One kernel for all parameters instead of a dozen for each kind of update.
            fused=torch.device(run.device).type == "cuda",
        )  # fmt: skip

    def prepare(self) -> tuple[AdaptedModel, list[dict[str, Any]]]:
        """LoRA first, then the selectors: peft freezes what it finds."""
        run = self.run
        self.lora: Any = None
        if run.train == "lora":
            self.lora = add_lora(self.model, run.lora_rank)
        if run.attention == "dense":
            adapted = AdaptedModel(self.model, [], {})
        elif run.adapter is not None:
            # A folder, never a name on the Hub.
            adapted = SelectorAdapter.read(run.adapter).apply(self.model)
        else:
            adapted = adapt(self.model, run.config, layers=run.layers)
            fit_low_rank(adapted, self.tokens, length=run.seq_len)
        if run.train == "selectors":
            adapted.freeze_base()
        selectors = adapted.selector_parameters()
        own = {id(p) for p in selectors}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        groups = [
            {"params": selectors, "peak": run.learning_rate},
            {"params": rest, "peak": run.base_learning_rate},
        ]
        return adapted, [group for group in groups if group["params"]]

    def step(self) -> dict[str, float]:
        """Does one optimiser step; returns ``"loss"`` and ``"seconds"``.

        Raises:
            TrainingError: If the loss is no longer finite.
        """
        start, run = time.perf_counter(), self.run
        factor = min(1.0, (self.step_count + 1) / max(1, run.steps // 20))
        factor *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.step_count / run.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.windows.next_batch(run.batch_size).to(run.device)
        with self.autocast():
            value = self.losses(batch)
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {self.step_count + 1}; lower the learning rate "
                f"({run.learning_rate:g})."
            )
        for own in self.groups:
            # Apart, so that a large gradient of the one does not silence the other.
            nn.utils.clip_grad_norm_(own["params"], 1.0)
        self.optimizer.step()
        self.step_count += 1
        seconds = max(time.perf_counter() - start, 0.0)
        self.seconds += seconds
        return {"loss": value, "seconds": seconds}

    def losses(self, batch: Tensor) -> float:
        """Cross entropy of the next token, in nats, and its gradients."""
        run = self.run
        self.model.train()
        warm = run.sparsity_warmup * run.steps
        progress = 1.0 if self.step_count >= warm else self.step_count / warm
        self._set_sparsity(1 - (1 - run.base_sparsity) ** progress)
        if self.step_count % run.calibrate_every == 0:
            self.calibrate(run.base_sparsity, (run.seq_len,))
        for selector in self.adapted.selectors.values():
            # In evaluation mode a selector chooses and nothing more; attention still has gradients.
            selector.train(run.selectors_learn(self.step_count))
        loss = next_token_loss(self.model, batch)
        loss.backward()
        return float(loss.detach())

    def _set_sparsity(self, value: float) -> None:
        run = self.run
        warm, goal = (
            self.adapted.layer_sparsities(x, run.seq_len) for x in (value, run.base_sparsity)
        )
        for number, selector in self.adapted.selectors.items():
            if isinstance(selector, BlockSparseAdaptive):
                goals = goal if selector.budget.calibrated else warm
                selector.set_base_sparsity(goals[number])
                # Selectors that were fitted need little noise to explore.
                selector.set_temperature(selector.config.min_temperature)

    def validate(self) -> dict[str, float]:
        """The loss on the held-out windows, at the sparsity to tune for, and that sparsity."""
        self._set_sparsity(self.run.base_sparsity)
        if self.step_count == 0:
            self.calibrate(self.run.base_sparsity, (self.run.seq_len,))
        with self.autocast(), CountTiles(self.adapted) as tiles:
            values = {"validation_loss": mean_loss(self.model, self.validation)}
        return {**values, "sparsity": tiles.sparsity} if self.adapted.selectors else values

    def save(self, folder: Path, report: Report | None = None) -> None:
        """Writes what was trained: ``adapter``, and ``lora`` or ``model``."""
        if self.adapted.selectors:
            self._set_sparsity(self.run.base_sparsity)
            self.save_selectors(folder, self.run.base_sparsity, report)
        if self.lora is not None:
            with replaced_folder(folder / LORA_NAME) as new:
                self.lora.save_pretrained(new)
                seal_folder(new)
        if self.run.train == "all":
            with replaced_folder(folder / MODEL_NAME) as new:
                # The model alone: selectors are an adapter of their own.
                weights = {
                    name: value
                    for name, value in self.model.state_dict().items()
                    if f".{SELECTOR}." not in name
                }
                self.model.save_pretrained(new, state_dict=weights)
                seal_folder(new)

    def trained(self) -> list[nn.Parameter]:
        """All that the optimiser changes, in order."""
        return [p for group in self.groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Trained parameters, optimiser, data position, random numbers and time spent."""
        on_gpu = torch.device(self.run.device).type == "cuda"
        return {
            "step_count": self.step_count,
            "seconds": self.seconds,
            "parameters": [p.detach().cpu() for p in self.trained()],
            # Beside their parameters: thresholds, sparsity and temperature.
            "selectors": {
                str(number): selector.state_dict()
                for number, selector in self.adapted.selectors.items()
            },
            "optimizer": self.optimizer.state_dict(),
            "data_position": self.windows.position,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.run.device) if on_gpu else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`'s result, of the same run, model and text.

        Raises:
            CheckpointError: If it is another run's; nothing has changed then.
        """
        check_training_state(self.state_dict(), state, self.optimizer)
        with torch.no_grad():
            for parameter, value in zip(self.trained(), state["parameters"], strict=True):
                parameter.copy_(value)
        for number, selector in self.adapted.selectors.items():
            selector.load_state_dict(state["selectors"][str(number)])
        self.optimizer.load_state_dict(state["optimizer"])
        self.windows.position = state["data_position"]
        self.step_count, self.seconds = state["step_count"], state["seconds"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.run.device)
