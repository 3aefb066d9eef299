"""End-to-end tuning of selectors, with LoRA or all weights, on the language-modelling loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.files import replaced_folder
from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel, adapt
from dilated_attention_pytorch.integrations.transformers.adapter import (
    SelectorAdapter,
    save_adapter,
)
from dilated_attention_pytorch.integrations.transformers.attention import SELECTOR
from dilated_attention_pytorch.integrations.transformers.calibrate import (
    calibrate,
    default_lengths,
)
from dilated_attention_pytorch.integrations.transformers.fit import fit_low_rank
from dilated_attention_pytorch.integrations.transformers.lora import add_lora
from dilated_attention_pytorch.integrations.transformers.observer import evaluating
from dilated_attention_pytorch.integrations.transformers.offloaded import input_device
from dilated_attention_pytorch.integrations.transformers.pretrained_training import (
    PretrainedRun,
    PretrainedTraining,
)
from dilated_attention_pytorch.integrations.transformers.sealed_folder import seal_folder
from dilated_attention_pytorch.integrations.transformers.tiles import CountTiles
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive

TRAINED = ("selectors", "lora", "all")
ATTENTION = ("sparse", "dense")
# Folders of what was trained.
ADAPTER_NAME, LORA_NAME, MODEL_NAME = "adapter", "lora", "model"


@dataclass(frozen=True, kw_only=True)
class TuneRun(PretrainedRun):
    """An end-to-end run.

    Attributes:
        train: ``"selectors"`` alone on a frozen base; ``"lora"``: low-rank changes of all
            projections beside them (through peft); ``"all"``: all weights.
        attention: ``"sparse"``; ``"dense"`` is the baseline without selectors.
        adapter: Folder of the selectors to start from; None: untrained ones.
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
        for name, valid in (("train", TRAINED), ("attention", ATTENTION)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {valid}, got {getattr(self, name)!r}.")
        if self.attention == "dense" and (self.train == "selectors" or self.adapter is not None):
            raise ValueError(
                "attention='dense' has no selectors: train must be 'lora' or 'all' and adapter "
                f"None, got {self.train!r} and {self.adapter!r}."
            )
        if not (math.isfinite(self.base_learning_rate) and self.base_learning_rate > 0):
            raise ValueError(f"base_learning_rate must be positive, got {self.base_learning_rate}.")
        for name in ("lora_rank", "calibrate_every", "selector_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.sparsity_warmup <= 1:
            raise ValueError(f"sparsity_warmup must lie in [0, 1], got {self.sparsity_warmup}.")

    def selectors_learn(self, step: int) -> bool:
        """Whether the selectors learn in a step, counted from 0."""
        return self.train == "selectors" or step % self.selector_every == 0


class Tuning(PretrainedTraining):
    """Trains selectors, and LoRA or all weights, on the next token.

    The selectors learn from the attention itself (``AdaptiveConfig.estimator``), the rest from the
    loss. With LoRA ``model`` stays the base model; its layers hold the low-rank changes.
    """

    run: TuneRun

    def prepare(self) -> tuple[AdaptedModel | None, list[dict[str, Any]]]:
        """LoRA first, then the selectors: peft freezes what it finds."""
        run = self.run
        self.lora: Any = None
        if run.train == "lora":
            self.lora = add_lora(self.model, run.lora_rank)
        adapted = None
        if run.attention == "sparse":
            if run.adapter is not None:
                # A folder, never a name on the Hub.
                adapted = SelectorAdapter.read(run.adapter).apply(self.model)
            else:
                adapted = adapt(self.model, run.config, layers=run.layers)
                fit_low_rank(adapted, self.windows.data, length=run.seq_len)
        selectors = [] if adapted is None else adapted.selector_parameters()
        if run.train == "selectors" and adapted is not None:
            adapted.freeze_base()
        own = {id(p) for p in selectors}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        groups = [
            {"params": selectors, "peak": run.learning_rate},
            {"params": rest, "peak": run.base_learning_rate},
        ]
        return adapted, [group for group in groups if group["params"]]

    def losses(self, batch: Tensor) -> float:
        """Cross entropy of the next token, in nats."""
        run = self.run
        self.model.train()
        if self.adapted is not None:
            warm = run.sparsity_warmup * run.steps
            progress = 1.0 if self.step_count >= warm else self.step_count / warm
            self._set_sparsity(1 - (1 - run.base_sparsity) ** progress)
            if self.step_count % run.calibrate_every == 0:
                self._calibrate()
            for selector in self.adapted.selectors.values():
                # In evaluation mode a selector chooses and nothing more; attention still has
                # gradients.
                selector.train(run.selectors_learn(self.step_count))
        loss = next_token_loss(self.model, batch)
        loss.backward()
        return float(loss.detach())

    def _set_sparsity(self, value: float) -> None:
        if self.adapted is None:
            return
        run = self.run
        warm, goal = (
            self.adapted.layer_sparsities(x, run.seq_len) for x in (value, run.base_sparsity)
        )
        for number, selector in self.adapted.selectors.items():
            if isinstance(selector, BlockSparseAdaptive):
                calibrated = selector.config.budget == "threshold"
                selector.set_base_sparsity((goal if calibrated else warm)[number])
                # Selectors that were distilled need little noise to explore.
                selector.set_temperature(selector.config.min_temperature)

    def _calibrate(self) -> None:
        if self.adapted is not None:
            with self.autocast():
                # Spread over the whole text: thresholds of code miss the sparsity on prose.
                calibrate(
                    self.adapted, self.windows.data, self.run.base_sparsity,
                    lengths=(self.run.seq_len,),
                )  # fmt: skip

    def validate(self) -> dict[str, float]:
        """The loss on the held-out windows, at the sparsity to tune for, and that sparsity."""
        self._set_sparsity(self.run.base_sparsity)
        if self.step_count == 0:
            self._calibrate()
        with self.autocast(), CountTiles(self.adapted) as tiles:
            values = {"validation_loss": mean_loss(self.model, self.validation)}
        return values if self.adapted is None else {**values, "sparsity": tiles.sparsity}

    def save(self, folder: Path) -> None:
        """Writes what was trained: ``adapter``, and ``lora`` or ``model``."""
        if self.adapted is not None:
            self._set_sparsity(self.run.base_sparsity)
            with self.autocast():
                calibrate(
                    self.adapted, self.windows.data, self.run.base_sparsity,
                    lengths=default_lengths(self.run.seq_len),
                )  # fmt: skip
            save_adapter(self.adapted, folder / ADAPTER_NAME)
        if self.lora is not None:
            with replaced_folder(folder / LORA_NAME) as new:
                self.lora.save_pretrained(new)
                seal_folder(new)
        if self.run.train == "all":
            with replaced_folder(folder / MODEL_NAME) as new:
                self._save_model(new)
                seal_folder(new)

    def _save_model(self, folder: Path) -> None:
        """The model alone: selectors are an adapter of their own."""
        weights = {
            name: value
            for name, value in self.model.state_dict().items()
            if f".{SELECTOR}." not in name
        }
        self.model.save_pretrained(folder, state_dict=weights)


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
