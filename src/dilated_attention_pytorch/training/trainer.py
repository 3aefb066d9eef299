"""AdaptiveSparsityTrainer: anneals temperature and sparsity of all adaptive layers of a model."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dilated_attention_pytorch.analysis.probe import call_model, evaluation_mode
from dilated_attention_pytorch.analysis.statistics import PatternStatistics
from dilated_attention_pytorch.config import as_int, check_sparsity
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import observe_patterns
from dilated_attention_pytorch.strict_json import short_repr
from dilated_attention_pytorch.training.schedules import SCHEDULES


class AdaptiveSparsityTrainer:
    """Schedules the temperature and, if asked, the sparsity of every adaptive layer.

    How annealing and ``learnable_temperature`` share the temperature: the trainer sets the
    *scheduled* temperature; a layer with ``learnable_temperature`` multiplies it by its own learned
    factor, which starts at 1 and which the trainer never touches; ``min_temperature`` bounds the
    product from below.

    The sparsity can start dense: it stays at ``initial_sparsity`` for ``dense_steps``, then moves
    to each layer's configured ``base_sparsity`` over ``sparsity_warmup_steps``, geometrically in
    the share of kept blocks.

    Args:
        model: An adaptive layer, or a model that holds some. None: :meth:`attach` one later.
        initial_temperature: Before the first step, > 0 in float32.
        final_temperature: From ``annealing_steps`` on, likewise.
        annealing_steps: Calls of :meth:`step` until then, >= 1.
        schedule: ``"exponential"``, ``"linear"`` or ``"cosine"``.
        sparsity_warmup_steps: Steps from the initial sparsity to the configured one; 0: none.
        dense_steps: Steps at the initial sparsity before that.
        initial_sparsity: Where the warm-up starts, in [0, 1).

    Raises:
        TypeError: If ``model`` is not a module, or a number of steps no int.
        ValueError: If a number is out of range, the schedule unknown, or the model holds no
            adaptive layer.

    Example:
        >>> layer = BlockSparseAdaptive(num_heads=2, head_dim=16)
        >>> trainer = AdaptiveSparsityTrainer(layer, 1.0, 0.1, annealing_steps=2)
        >>> trainer.step(), trainer.step()
        (0.316..., 0.1)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        initial_temperature: float = 1.0,
        final_temperature: float = 0.1,
        annealing_steps: int = 10_000,
        *,
        schedule: str = "exponential",
        sparsity_warmup_steps: int = 0,
        dense_steps: int = 0,
        initial_sparsity: float = 0.0,
    ) -> None:
        self.initial_temperature, self.final_temperature = initial_temperature, final_temperature
        self.annealing_steps, self.schedule = annealing_steps, schedule
        self.sparsity_warmup_steps, self.dense_steps = sparsity_warmup_steps, dense_steps
        self.initial_sparsity = initial_sparsity
        self.current_step = 0
        _check(self.state_dict())
        self.model: nn.Module | None = None
        if model is not None:
            self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Takes charge of a model's adaptive layers and sets them to the current step.

        Raises:
            TypeError: If ``model`` is not a module.
            ValueError: If it holds no adaptive layer.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
        if not _adaptive_layers(model):
            raise ValueError("model must hold at least one BlockSparseAdaptive layer, got none.")
        self.model = model
        self._apply()

    @property
    def temperature(self) -> float:
        """The scheduled temperature at the current step."""
        if self.current_step >= self.annealing_steps:
            return self.final_temperature
        move, progress = SCHEDULES[self.schedule], self.current_step / self.annealing_steps
        return move(self.initial_temperature, self.final_temperature, progress)

    def sparsity(self, base_sparsity: float) -> float:
        """The scheduled sparsity at the current step, for a layer that is to reach the base."""
        past = max(self.current_step - self.dense_steps, 0)
        if self.current_step >= self.dense_steps + self.sparsity_warmup_steps:
            return base_sparsity
        progress = past / max(self.sparsity_warmup_steps, 1)
        keep = SCHEDULES["exponential"](1 - self.initial_sparsity, 1 - base_sparsity, progress)
        return max(1 - keep, 0.0)

    def step(self) -> float:
        """Moves one optimiser step on; call it after ``optimizer.step()``.

        Returns:
            The temperature now scheduled.

        Raises:
            RuntimeError: If no model is attached.
        """
        self._layers()
        self.current_step += 1
        self._apply()
        return self.temperature

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: the step and the schedule's settings."""
        return {
            "current_step": self.current_step,
            "initial_temperature": self.initial_temperature,
            "final_temperature": self.final_temperature,
            "annealing_steps": self.annealing_steps,
            "schedule": self.schedule,
            "sparsity_warmup_steps": self.sparsity_warmup_steps,
            "dense_steps": self.dense_steps,
            "initial_sparsity": self.initial_sparsity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`'s result.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If keys are missing or unknown, or a value is out of range. After every
                error nothing has changed.
        """
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"state must hold exactly {sorted(expected)}, got {sorted(state)}.")
        _check(state)
        for name, value in state.items():
            setattr(self, name, value)
        if self.model is not None:
            self._apply()

    def analyze_patterns(
        self, dataloader: Iterable[Any], num_samples: int = 100
    ) -> dict[str, list[float]]:
        """Measures the patterns of a data set, in evaluation mode and without gradient.

        Args:
            dataloader: Batches for the model: a tensor, a tuple or list of positional arguments, a
                mapping of keyword arguments, or an object for a model that takes one. For a
                bare layer: ``(query, key, value)``, or one tensor to use as all three.
            num_samples: Samples to look at (rounded up to whole batches); fewer if there are
                fewer.

        Returns:
            Lists: ``"sparsity_ratios"`` (one per sample, layer and head),
            ``"pattern_diversity"`` (one per layer and head: mean Jaccard distance between the
            patterns of different samples; 0: always the same), ``"head_similarity"`` (one per
            sample, layer and pair of heads: Jaccard similarity).

        Raises:
            RuntimeError: If no model is attached.
            ValueError: If ``num_samples`` is not positive or the loader is empty.
        """
        layers = self._layers()
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        model = self.model
        if model is None:
            raise RuntimeError("no model is attached; call attach(model) first.")
        statistics = PatternStatistics(num_samples)
        watch = observe_patterns(layers, statistics.add)
        with evaluation_mode(model), torch.no_grad(), watch:
            for batch in dataloader:
                call_model(model, batch)
                if statistics.finish_batch():
                    break
        return statistics.summary()

    def _layers(self) -> list[BlockSparseAdaptive]:
        if self.model is None:
            raise RuntimeError(
                "AdaptiveSparsityTrainer has no model; pass model=... or call attach(model)."
            )
        return _adaptive_layers(self.model)

    def _apply(self) -> None:
        for layer in self._layers():
            layer.set_temperature(self.temperature)
            if self.sparsity_warmup_steps or self.dense_steps:
                layer.set_base_sparsity(self.sparsity(layer.config.base_sparsity))


def _check(state: Mapping[str, Any]) -> None:
    """Raises unless a state may be taken: it may come from a file."""
    # Layers hold their temperature in float32.
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for name in ("initial_temperature", "final_temperature", "initial_sparsity"):
        value = state[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {short_repr(value)}.")
    for name in ("initial_temperature", "final_temperature"):
        if not least <= state[name] <= most:
            raise ValueError(
                f"{name} must be positive and finite in float32, got {short_repr(state[name])}."
            )
    for name in ("annealing_steps", "sparsity_warmup_steps", "dense_steps", "current_step"):
        smallest, steps = 1 if name == "annealing_steps" else 0, as_int(name, state[name])
        if steps < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {short_repr(steps)}.")
    if not isinstance(state["schedule"], str):
        raise TypeError(f"schedule must be a name, got {short_repr(state['schedule'])}.")
    if state["schedule"] not in SCHEDULES:
        raise ValueError(
            f"schedule must be one of {sorted(SCHEDULES)}, got {short_repr(state['schedule'])}."
        )
    check_sparsity("initial_sparsity", state["initial_sparsity"])


def _adaptive_layers(model: nn.Module) -> list[BlockSparseAdaptive]:
    return [module for module in model.modules() if isinstance(module, BlockSparseAdaptive)]
