"""A byte-level causal language model: one training run that can stop and go on exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.config import (
    AdaptiveConfig,
    check_largest,
    check_types,
    from_plain,
    to_plain,
)
from dilated_attention_pytorch.models import (
    ATTENTION_NAMES,
    Transformer,
    build_attention,
    scorer_parameters,
)
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.tasks.text import TextData, TextWindows, validation_windows
from dilated_attention_pytorch.train.checkpoint import check_training_state
from dilated_attention_pytorch.train.monitor import TileCount
from dilated_attention_pytorch.train.trainer import (
    TEXT_DENSE_STEPS,
    AdaptiveSparsityTrainer,
    get_sparsity_loss,
    parameter_groups,
)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


def _language_config() -> AdaptiveConfig:
    # "past": the choice of blocks, too, must not see a byte that is still to be predicted. A
    # block's first bytes need those just before, which stand in another block. Without random
    # blocks: among few, text learns to lean on them.
    return AdaptiveConfig(
        block_size=16, base_sparsity=0.75, query_scope="past", num_local_blocks=1,
        num_explore_blocks=0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LanguageModelRun:
    """Everything that a run's result depends on, beside the text.

    Attributes:
        attention: A name of :func:`build_attention`.
        config: Settings of the attention; fixed patterns take sparsity and block size from it.
        segment_lengths: As in :class:`BlockSparseAdaptive`; None: choose from all blocks.
        dilation_rates: With ``segment_lengths``.
        dim: Model dimension.
        num_heads: Heads; must divide ``dim``.
        num_layers: Transformer blocks.
        seq_len: Bytes per sequence.
        batch_size: Sequences per step.
        steps: Optimiser steps.
        learning_rate: Peak, reached after a twentieth of the steps, falling by a cosine to 10 %.
        weight_decay: Of AdamW; see :func:`parameter_groups`.
        annealing_share: Share of the steps over which the temperature falls.
        schedule: How it falls: ``"exponential"``, ``"linear"`` or ``"cosine"``.
        sparsity_weight: Weight of the sparsity loss.
        validation_sequences: Held-out sequences to measure on.
        seed: Of weights, data order and exploration.
        threads: CPU threads; they decide the order of sums, so the last bits depend on them.
        device: Where to train.
    """

    attention: str = "adaptive"
    config: AdaptiveConfig = field(default_factory=_language_config)
    segment_lengths: tuple[int, ...] | None = None
    dilation_rates: tuple[int, ...] | None = None
    dim: int = 128
    num_heads: int = 4
    num_layers: int = 2
    seq_len: int = 512
    batch_size: int = 8
    steps: int = 500
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    annealing_share: float = 0.25
    schedule: str = "exponential"
    sparsity_weight: float = 0.01
    validation_sequences: int = 32
    seed: int = 0
    threads: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Checks every field."""
        check_types(self)
        check_largest(self)
        if self.attention not in ATTENTION_NAMES:
            raise ValueError(f"attention must be one of {ATTENTION_NAMES}, got {self.attention!r}.")
        for name in (
            "dim", "num_heads", "num_layers", "seq_len", "batch_size", "steps",
            "validation_sequences", "threads",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim must be a multiple of twice num_heads={self.num_heads} (rotary positions "
                f"need an even head size), got {self.dim}."
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        for name in ("weight_decay", "sparsity_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must not be negative, got {value}.")
        if not 0 < self.annealing_share <= 1:
            raise ValueError(f"annealing_share must lie in (0, 1], got {self.annealing_share}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")

    @property
    def annealing_steps(self) -> int:
        """Steps over which the temperature falls."""
        return max(1, round(self.annealing_share * self.steps))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dict(to_plain(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LanguageModelRun:
        """Builds a run from :meth:`to_dict`'s result."""
        return from_plain(cls, values, config=AdaptiveConfig.from_dict(values["config"]))


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step gave.

    Attributes:
        step: Steps done.
        loss: Cross-entropy in nats per byte, on this step's batch.
        sparsity: Of the tiles that this step computed, exploration included; None: dense.
        temperature: In force during the step; None without adaptive layers.
        seconds: Time of the step.
        layer_sparsity: The sparsity of every sparse layer.
    """

    step: int
    loss: float
    sparsity: float | None
    temperature: float | None
    seconds: float
    layer_sparsity: tuple[float, ...] = ()


@dataclass(frozen=True)
class ValidationResult:
    """Held-out text: the loss in nats per byte, and the sparsity with which it was reached."""

    loss: float
    sparsity: float | None

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits."""
        return self.loss / math.log(2)


class LanguageModelTraining:
    """The state of a run; :meth:`state_dict` holds all of it.

    On one machine and with as many threads, a run that was stopped and loaded again gives bit for
    bit what an uninterrupted one gives (on a GPU only if its kernels are deterministic).

    Args:
        run: What to train.
        text: What to train on.

    Raises:
        ValueError: If the device is missing, the text is shorter than a sequence, or the settings
            do not fit.
    """

    def __init__(self, run: LanguageModelRun, text: TextData) -> None:
        self.run = run
        check_device(run.device)
        torch.set_num_threads(run.threads)
        torch.manual_seed(run.seed)
        self.model = build_language_model(run)
        self.sparse_layers = [m for m in self.model.modules() if isinstance(m, BlockSparseLayer)]
        self.windows = TextWindows(text.train, run.seq_len, run.seed)
        self.validation = validation_windows(text.validation, run.seq_len, run.validation_sequences)
        self._selectors = scorer_parameters(self.model)
        own = {id(p) for p in self._selectors}
        self._rest = [p for p in self.model.parameters() if id(p) not in own]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, weight_decay=run.weight_decay),
            lr=run.learning_rate, betas=(0.9, 0.95),
        )  # fmt: skip
        self.trainer: AdaptiveSparsityTrainer | None = None
        if self._selectors:
            self.trainer = AdaptiveSparsityTrainer(
                self.model, annealing_steps=run.annealing_steps, schedule=run.schedule,
                dense_steps=TEXT_DENSE_STEPS,
            )  # fmt: skip
        self.step_count, self.seconds = 0, 0.0

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step_count >= self.run.steps

    def step(self) -> StepResult:
        """Does one optimiser step.

        Raises:
            TrainingError: If the loss is no longer finite.
        """
        start = time.perf_counter()
        self._set_learning_rate()
        temperature = None if self.trainer is None else self.trainer.temperature
        self.model.train()
        batch = self.windows.next_batch(self.run.batch_size).to(self.run.device)
        with TileCount(self.sparse_layers) as tiles:
            loss = next_byte_loss(self.model, batch)
        total = loss
        if self.trainer is not None and self.run.sparsity_weight:
            total = loss + self.run.sparsity_weight * get_sparsity_loss(self.model)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {self.step_count + 1}; lower the learning rate "
                f"({self.run.learning_rate:g})."
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        # Apart, so that a large gradient of the one does not silence the other.
        for parameters in filter(None, (self._rest, self._selectors)):
            nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        if self.trainer is not None:
            self.trainer.step()
        self.step_count += 1
        seconds = max(time.perf_counter() - start, 0.0)
        self.seconds += seconds
        sparsity, by_layer = tiles.sparsity, tiles.layer_sparsity
        return StepResult(self.step_count, value, sparsity, temperature, seconds, by_layer)

    @torch.no_grad()
    def validate(self) -> ValidationResult:
        """Measures on the held-out text, in evaluation mode; changes nothing."""
        self.model.eval()
        total = 0.0
        with TileCount(self.sparse_layers) as tiles:
            for rows in self.validation.split(self.run.batch_size):
                total += next_byte_loss(self.model, rows.to(self.run.device)).item() * len(rows)
        return ValidationResult(total / len(self.validation), tiles.sparsity)

    def state_dict(self) -> dict[str, Any]:
        """Model, optimiser, schedule, data position, random numbers and time spent."""
        on_gpu = torch.device(self.run.device).type == "cuda"
        return {
            "run": self.run.to_dict(),
            "step_count": self.step_count,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trainer": None if self.trainer is None else self.trainer.state_dict(),
            "data_position": self.windows.position,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.run.device) if on_gpu else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`'s result, of the same run and text.

        Raises:
            CheckpointError: If it is another run's; nothing has changed then.
        """
        check_training_state(self.state_dict(), state, self.optimizer)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.trainer is not None:
            self.trainer.load_state_dict(state["trainer"])
        self.windows.position = state["data_position"]
        self.step_count, self.seconds = state["step_count"], state["seconds"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.run.device)

    def _set_learning_rate(self) -> None:
        run, step = self.run, self.step_count
        warmup = max(1, run.steps // 20)
        rate = min(1.0, (step + 1) / warmup)
        rate *= 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / run.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = run.learning_rate * rate


def check_device(name: str) -> None:
    """Raises ValueError unless tensors can be made on a device."""
    try:
        torch.empty(1, dtype=torch.float32, device=name)
    # torch raises AssertionError if it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error


def build_language_model(run: LanguageModelRun) -> Transformer:
    """The untrained model of a run, from torch's random state."""

    def make(num_heads: int, head_dim: int) -> nn.Module:
        return build_attention(
            run.attention, num_heads, head_dim, run.config, segment_lengths=run.segment_lengths,
            dilation_rates=run.dilation_rates,
        )  # fmt: skip

    model = Transformer(run.dim, run.num_heads, run.num_layers, make, feed_forward=4 * run.dim)
    return model.to(run.device)


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Cross-entropy in nats per byte of ``(batch, seq_len + 1)`` windows."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
