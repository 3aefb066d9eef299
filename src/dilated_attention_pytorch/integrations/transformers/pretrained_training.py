"""What distilling and tuning a pretrained model share: data, optimiser, schedule and state."""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig, check_largest, check_types, from_plain
from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.integrations.transformers.selection_quality import measure_selection
from dilated_attention_pytorch.integrations.transformers.tokens import TokenText
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.tasks.text import TextWindows, validation_windows
from dilated_attention_pytorch.train.checkpoint import check_training_state
from dilated_attention_pytorch.train.language_model import TrainingError, check_device
from dilated_attention_pytorch.train.trainer import parameter_groups

DTYPES = ("float32", "bfloat16")


def distilled_config(**changes: Any) -> AdaptiveConfig:
    """The selector for frozen queries and keys: low-rank scores, blocks of 32, thresholds.

    On frozen features what reads them is the bottleneck. Summaries of blocks keep nearly as much
    attention mass as the best choice and still cost far more perplexity: they miss sharp matches
    between single tokens, which projected tokens show (``docs/log.md``). With
    ``query_scope="past"`` generation with a cache chooses once per block of tokens and gives the
    tokens of generation without one; with ``"block"`` it reads the cached keys at every
    ``query_stride``-th token.

    Args:
        **changes: Other fields of :class:`AdaptiveConfig`.
    """
    settings: dict[str, Any] = {
        "scorer": "low_rank",
        "hidden_dim": 32,
        "budget": "threshold",
        "block_size": 32,
        "learnable_temperature": False,
        "num_explore_blocks": 1,
    }
    return AdaptiveConfig.from_dict(settings | changes)


@dataclass(frozen=True, kw_only=True)
class PretrainedRun:
    """Everything that a run's result depends on, beside the model and the text.

    Attributes:
        config: Settings of the selectors.
        layers: Layers to make sparse; None: all without a sliding window.
        seq_len: Tokens per window.
        batch_size: Windows per step.
        steps: Optimiser steps.
        learning_rate: Peak of the selectors' rate, reached after a twentieth of the steps, falling
            by a cosine to 5 %.
        weight_decay: Of AdamW; see :func:`parameter_groups`.
        validation_windows: Held-out windows to measure on.
        seed: Of the selectors' weights and of the data order.
        device: Where to train.
        dtype: ``"float32"``, or ``"bfloat16"``: autocast.
    """

    config: AdaptiveConfig = field(default_factory=distilled_config)
    layers: tuple[int, ...] | None = None
    seq_len: int = 2048
    batch_size: int = 1
    steps: int = 300
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    validation_windows: int = 2
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks every field."""
        check_types(self)
        check_largest(self)
        for name in ("seq_len", "batch_size", "steps", "validation_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.seq_len < 2 * self.config.block_size:
            raise ValueError(
                f"seq_len must be at least two blocks of {self.config.block_size} tokens, got "
                f"{self.seq_len}: there would be nothing to choose."
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}.")
        check_device(self.device)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["config"] = self.config.to_dict()
        out["layers"] = None if self.layers is None else list(self.layers)
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a run from :meth:`to_dict`'s result."""
        return from_plain(cls, values, config=AdaptiveConfig.from_dict(values["config"]))


class PretrainedTraining(ABC):
    """The state of a run on a pretrained model; :meth:`state_dict` holds all that changes.

    On one machine and with as many threads, a run that was stopped and loaded again gives bit for
    bit what an uninterrupted one gives (on a GPU only if its kernels are deterministic).

    Args:
        run: What to train.
        model: The model, on the run's device; it is adapted or not by the subclass.
        text: Tokens.
    """

    # Learning rates of the groups of parameters, at their peak, filled by subclasses.
    groups: list[dict[str, Any]]

    def __init__(self, run: PretrainedRun, model: Any, text: TokenText) -> None:
        self.run, self.model = run, model
        torch.manual_seed(run.seed)
        self.windows = TextWindows(text.train, run.seq_len, run.seed)
        self.validation = validation_windows(text.validation, run.seq_len, run.validation_windows)
        self.adapted, self.groups = self.prepare()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, weight_decay=run.weight_decay, groups=self.groups),
            betas=(0.9, 0.98),
            # One kernel for all parameters instead of a dozen for each kind of update.
            fused=torch.device(run.device).type == "cuda",
        )  # fmt: skip
        self.step_count, self.seconds = 0, 0.0

    @abstractmethod
    def prepare(self) -> tuple[AdaptedModel | None, list[dict[str, Any]]]:
        """Adapts the model and names what to train: ``"params"`` and ``"peak"`` rates."""

    @abstractmethod
    def losses(self, batch: Tensor) -> float:
        """Computes the loss of ``(batch, seq_len + 1)`` tokens and its gradients."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Measures on the held-out windows; changes nothing."""

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step_count >= self.run.steps

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

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        kind = torch.device(self.run.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.run.dtype == "bfloat16")

    def selection_values(self) -> dict[str, float]:
        """Recall and kept mass on the held-out windows, at the run's sparsity and around it."""
        if self.adapted is None:
            return {}
        with self.autocast():
            found = measure_selection(self.adapted, self.validation[:, :-1], (0.5, 0.8, 0.9))
        out = {}
        for quality in found:
            if math.isnan(quality.recall):
                # The forced blocks fill the budget: nothing was chosen.
                continue
            out[f"recall_{quality.sparsity:g}"] = quality.recall
            out[f"kept_mass_{quality.sparsity:g}"] = quality.kept_mass
            out[f"best_mass_{quality.sparsity:g}"] = quality.best_mass
        return out

    def _selectors(self) -> dict[int, BlockSparseLayer]:
        return {} if self.adapted is None else self.adapted.selectors

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
                str(number): selector.state_dict() for number, selector in self._selectors().items()
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
        for number, selector in self._selectors().items():
            selector.load_state_dict(state["selectors"][str(number)])
        self.optimizer.load_state_dict(state["optimizer"])
        self.windows.position = state["data_position"]
        self.step_count, self.seconds = state["step_count"], state["seconds"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.run.device)
