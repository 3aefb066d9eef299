"""AdaptiveSparsityTrainer: anneals temperature and sparsity of all adaptive layers of a model."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.analysis.recording import call_model, evaluation_mode
from dilated_attention_pytorch.analysis.statistics import PatternStatistics
from dilated_attention_pytorch.config import as_int, check_sparsity
from dilated_attention_pytorch.foreign_text import short_repr
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer, observe_patterns
from dilated_attention_pytorch.nn.held_budget import (
    LEAVE_PLATEAU,
    PEAKED,
    SKILLED,
    start_of,
)
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer

Schedule = Callable[[float, float, float], float]


def linear(start: float, end: float, progress: float) -> float:
    """A straight line."""
    return start + (end - start) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine: slow at both ends."""
    return linear(start, end, 0.5 * (1 - math.cos(math.pi * progress)))


def exponential(start: float, end: float, progress: float) -> float:
    """A constant factor per step; both ends must be positive."""
    # Not by their quotient, which need not be a finite number.
    return math.exp(linear(math.log(start), math.log(end), progress))


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine, "exponential": exponential}


def get_sparsity_loss(model: nn.Module) -> Tensor:
    """Mean of :meth:`BlockSparseAdaptive.get_sparsity_loss` over the layers of a model.

    Raises:
        RuntimeError: If a layer has run no forward pass.
        ValueError: If the model holds no adaptive layer.

    Example:
        >>> import torch
        >>> model = nn.ModuleList([BlockSparseAdaptive(num_heads=2, head_dim=16)])
        >>> x = torch.randn(1, 512, 2, 16)
        >>> loss = model[0](x, x, x).square().mean() + 0.01 * get_sparsity_loss(model)
        >>> loss.requires_grad
        True
    """
    losses = [m.get_sparsity_loss() for m in model.modules() if isinstance(m, BlockSparseAdaptive)]
    if not losses:
        raise ValueError("model holds no BlockSparseAdaptive layer.")
    return torch.stack(losses).mean()


# By name: sharding flattens parameters, so that all of them would look like vectors.
_KEPT = ("budget_gain", "budget_offset", "gain", "log_temperature")


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.01,
    groups: Iterable[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Splits parameters for an optimiser: gains, offsets and temperatures do not decay.

    Their neutral value is not 0: decay makes an adaptive budget smaller and flatter, and a
    temperature forget. It shows where nothing else moves them. Under ``torch.distributed`` every
    parameter of a layer gets a gradient, of zeros if need be, and what has a gradient decays: in
    200 steps of AdamW at a rate of 3e-3 and a decay of 0.1 a gain of 1 becomes 0.942.

    Args:
        model: Holds adaptive layers or scorers; any other model gives a group that decays.
        weight_decay: Of all other parameters, unless their group names its own; not negative.
        groups: As for an optimiser: dicts of ``"params"`` and options, which both parts of a group
            keep. None: one group of all parameters of ``model``.

    Returns:
        Per group the part that decays and the part that does not, without empty ones.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If a weight decay is negative or not finite.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import MultiheadAdaptiveAttention
        >>> layer = MultiheadAdaptiveAttention(embed_dim=64, num_heads=4)
        >>> optimizer = torch.optim.AdamW(parameter_groups(layer, weight_decay=0.1), lr=1e-3)
        >>> [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
        [(6, 0.1), (4, 0.0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    kept = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BlockSparseLayer | ImportanceScorer)
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] in _KEPT
    }
    found: list[dict[str, Any]] = []
    given_groups: Iterable[Mapping[str, Any]] = groups or [{"params": model.parameters()}]
    for group in given_groups:
        decay, given = group.get("weight_decay", weight_decay), list(group["params"])
        if not (math.isfinite(decay) and decay >= 0):
            raise ValueError(f"weight_decay must be finite and not negative, got {decay}.")
        parts = (
            ([p for p in given if id(p) not in kept], decay),
            ([p for p in given if id(p) in kept], 0.0),
        )
        found += [{**group, "params": own, "weight_decay": rate} for own, rate in parts if own]
    return found


# Text learns from the first step on, and better without a dense start.
TEXT_DENSE_STEPS = 0
# How often starts are looked for: the host waits for the device then.
_LOOK_EVERY = 10
# A start that was shorter says nothing of a plateau.
_LONG_START = 100
# Shortly before attention finds out where to read it often looks at something else as clearly, and
# the selector knows it as well: for up to 500 of 2,000 steps in the map's cells. What attention
# finds out then is new to the selector, whose skill falls below this.
_NEW = 0.4
# What a state holds besides the arrivals.
_SETTINGS = (
    "current_step", "initial_temperature", "final_temperature", "annealing_steps", "schedule",
    "sparsity_warmup_steps", "dense_steps", "initial_sparsity", "explore_steps",
)  # fmt: skip


class AdaptiveSparsityTrainer:
    """Schedules the temperature and, if asked, the sparsity of every adaptive layer.

    How annealing and ``learnable_temperature`` share the temperature: the trainer sets the
    *scheduled* temperature; a layer with ``learnable_temperature`` multiplies it by its own learned
    factor, which starts at 1 and which the trainer never touches; ``min_temperature`` bounds the
    product from below.

    From the first :meth:`step` on layers are dense (``initial_sparsity``), so that attention finds
    out what to look at; then they move to their configured ``base_sparsity`` over
    ``sparsity_warmup_steps``, geometrically in the share of kept blocks. Each layer begins to move
    as soon as what its selector is to learn says clearly where to read (its target stands 0.4 of
    the way from uniform to one block) and the selector says it, too (the mass of its best block
    stands 0.8 of the way from a block at random to the best one), and the target was new to the
    selector (it stood below 0.4) or has been clear for ``annealing_steps``: shortly before
    attention finds out, it often looks at something else as clearly. From ``annealing_steps`` on a
    layer follows whose target never becomes clear, if another one has begun. Where none has, the
    trainer warns; all have their sparsity at ``explore_steps`` at the latest, as sparse attention
    hardly ever finds out what dense attention has not. Some are left as they are: layers that say
    so already, as trained ones do; those whose selector is not taught by the mass of its tiles, or
    whose budget is no share; and those that were set to a sparsity of their own. Language models
    learn from the first step on and lose by a dense start: give them ``dense_steps=0``.

    At the end training reads what evaluation reads: from ``explore_steps`` on layers that the mass
    of their tiles teaches draw neither noise nor random blocks; their temperature is 0.

    Args:
        model: An adaptive layer, or a model that holds some. None: :meth:`attach` one later.
        initial_temperature: Before the first step, > 0 in float32. None: each layer's
            ``temperature`` in its :class:`AdaptiveConfig`.
        final_temperature: From ``annealing_steps`` on, > 0 in float32. None: each layer's
            ``min_temperature``.
        annealing_steps: Calls of :meth:`step` until then, >= 1; about a quarter of the training.
        schedule: ``"exponential"``, ``"linear"`` or ``"cosine"``.
        sparsity_warmup_steps: Steps from the initial sparsity to the configured one; 0: none.
            None: a tenth of ``annealing_steps``.
        dense_steps: Steps at the initial sparsity before that, the same for all layers, which are
            set to it at once; 0: none. None: as many as each layer needs.
        initial_sparsity: Where the warm-up starts, in [0, 1).
        explore_steps: Steps until layers no longer explore. None: three times ``annealing_steps``,
            three quarters of a training that anneals over the first quarter.

    Raises:
        TypeError: If ``annealing_steps`` is missing, ``model`` is not a module, or a number of
            steps no int.
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
        initial_temperature: float | None = None,
        final_temperature: float | None = None,
        annealing_steps: int | None = None,
        *,
        schedule: str = "exponential",
        sparsity_warmup_steps: int | None = None,
        dense_steps: int | None = None,
        initial_sparsity: float = 0.0,
        explore_steps: int | None = None,
    ) -> None:
        if annealing_steps is None:
            raise TypeError(
                "AdaptiveSparsityTrainer needs annealing_steps, the steps until its schedules end: "
                "about a quarter of the training, as in annealing_steps=total_steps // 4."
            )
        self.initial_temperature, self.final_temperature = initial_temperature, final_temperature
        self.annealing_steps, self.schedule = annealing_steps, schedule
        self.sparsity_warmup_steps, self.dense_steps = sparsity_warmup_steps, dense_steps
        self.initial_sparsity, self.explore_steps = initial_sparsity, explore_steps
        self.current_step = 0
        # The step at which each layer has its own sparsity. Negative: it waits; -1 - s where its
        # target has been clear since step s, -2 where it was new to the selector.
        self.arrivals: list[int] = []
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
        if len(self.arrivals) != len(self._layers()):
            self.arrivals = [self._arrival(layer) for layer in self._layers()]
        self._apply()

    @property
    def temperature(self) -> float:
        """The scheduled temperature at the current step, of the first layer if they differ.

        Raises:
            RuntimeError: If no model is attached.
        """
        return self._temperature(self._layers()[0])

    def _temperature(self, layer: BlockSparseAdaptive) -> float:
        config, first, last = layer.config, self.initial_temperature, self.final_temperature
        if layer.learns_by_mass and self.current_step >= self._exploring:
            return 0.0
        last = config.min_temperature if last is None else last
        if self.current_step >= self.annealing_steps:
            return last
        first = config.temperature if first is None else first
        return SCHEDULES[self.schedule](first, last, self.current_step / self.annealing_steps)

    def sparsity(self, base_sparsity: float, arrival: int | None = None) -> float:
        """The scheduled sparsity at the current step.

        Args:
            base_sparsity: Of the layer.
            arrival: The step at which it is to have it; negative: it has not begun to move. None:
                behind ``dense_steps`` and the warm-up.
        """
        if arrival is None:
            arrival = (self.dense_steps or 0) + self._warmup
        if 0 <= arrival <= self.current_step:
            return base_sparsity
        left = (arrival - self.current_step) / max(self._warmup, 1) if arrival >= 0 else 1.0
        progress = 1 - min(left, 1.0)
        keep = SCHEDULES["exponential"](1 - self.initial_sparsity, 1 - base_sparsity, progress)
        return max(1 - keep, 0.0)

    @property
    def _exploring(self) -> int:
        return 3 * self.annealing_steps if self.explore_steps is None else self.explore_steps

    @property
    def _warmup(self) -> int:
        if self.sparsity_warmup_steps is not None:
            return self.sparsity_warmup_steps
        return self.annealing_steps // 10 if self.dense_steps is None else 0

    def step(self) -> float:
        """Moves one optimiser step on; call it after ``optimizer.step()``.

        Returns:
            The :attr:`temperature` now scheduled.

        Raises:
            RuntimeError: If no model is attached.
        """
        layers = self._layers()
        self.current_step += 1
        self._look_for_starts(layers)
        self._apply()
        return self.temperature

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: the step and the schedule's settings."""
        return {name: getattr(self, name) for name in _SETTINGS} | {"arrivals": list(self.arrivals)}

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
        if self.model is not None and len(state["arrivals"]) != len(self._layers()):
            raise ValueError(
                f"arrivals must hold one step for each of {len(self._layers())} adaptive layers, "
                f"got {len(state['arrivals'])}."
            )
        for name, value in state.items():
            setattr(self, name, list(value) if name == "arrivals" else value)
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
        model, layers = self._attached(), self._layers()
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        statistics = PatternStatistics(num_samples)
        watch = observe_patterns(layers, statistics.add)
        with evaluation_mode(model), torch.no_grad(), watch:
            for batch in dataloader:
                call_model(model, batch)
                if statistics.finish_batch():
                    break
        return statistics.summary()

    def _layers(self) -> list[BlockSparseAdaptive]:
        return _adaptive_layers(self._attached())

    def _attached(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError(
                "AdaptiveSparsityTrainer has no model; pass model=... or call attach(model)."
            )
        return self.model

    def _arrival(self, layer: BlockSparseAdaptive) -> int:
        """When a layer has its sparsity; -1: it waits for its start; 0: it is left as it is."""
        if self.dense_steps is not None or self.sparsity_warmup_steps:
            return (self.dense_steps or 0) + self._warmup
        keep, dense = layer.densest, 1 - self.initial_sparsity
        goal = 1 - layer.config.base_sparsity
        if not _has_start(layer):
            return 0
        if math.isclose(keep, dense, rel_tol=1e-6):
            return -1
        if math.isclose(keep, goal, rel_tol=1e-6):
            return 0 if self.current_step else -1
        # Trained weights whose schedules were not saved hold how far their layer had come.
        if self.current_step and min(dense, goal) < keep < max(dense, goal):
            left = math.log(keep / goal) / math.log(dense / goal)
            return self.current_step + round(left * self._warmup)
        # A sparsity of its own.
        return 0

    def _look_for_starts(self, layers: Sequence[BlockSparseAdaptive]) -> None:
        waiting = [n for n, arrival in enumerate(self.arrivals) if arrival < 0]
        step, annealed = self.current_step, self.annealing_steps
        end = max(self._exploring - self._warmup, annealed)
        if not waiting or not (step == 1 or step % _LOOK_EVERY == 0 or step in (annealed, end)):
            return
        # One wait for the device, however many layers there are.
        device = layers[waiting[0]].budget_state.device
        found = torch.stack([start_of(layers[n].budget_state).to(device) for n in waiting])
        starts = dict(zip(waiting, found.tolist(), strict=True))
        for n, (peak, skill) in starts.items():
            if peak < PEAKED:
                self.arrivals[n] = -1
            elif step == 1 and (skill >= SKILLED or skill == 0):
                # It was trained, perhaps before skill was measured.
                self.arrivals[n] = 0
            elif skill < _NEW:
                self.arrivals[n] = -2
            elif self.arrivals[n] == -1:
                self.arrivals[n] = -1 - step
        since = max(step - annealed, 1)
        held = {n for n in starts if -1 - since <= self.arrivals[n] < -1}
        started = len(starts) < sum(_has_start(layer) for layer in layers)
        # Peaks are 0 where no row has had three blocks to compare.
        any_known = any(peak for peak, _ in starts.values())
        last = step >= (annealed if annealed < _LONG_START or not any_known else end)
        for n, (peak, skill) in starts.items():
            along = step >= annealed and started and peak < PEAKED
            if self.arrivals[n] < 0 and (last or along or (n in held and skill >= SKILLED)):
                self.arrivals[n] = step + self._warmup
        if step == annealed and not started and max(self.arrivals[n] for n in starts) < 0:
            peak, skill = max(starts.values())
            warnings.warn(
                f"step {step}: all layers that begin dense still are. One leaves blocks out once "
                f"its selector's target is clear ({peak:.2f} of the way from uniform to one block, "
                f"{PEAKED:g} is enough), the selector meets it ({skill:.2f}, {SKILLED:g} is "
                f"enough), and it was new to the selector or has been clear for {annealed} steps; "
                f"at the latest at step {end}. If the loss falls all the same, as on text, "
                f"dense_steps=0 is better. Where it does not fall: {LEAVE_PLATEAU}",
                stacklevel=3,
            )

    def _apply(self) -> None:
        for layer, arrival in zip(self._layers(), self.arrivals, strict=True):
            if temperature := self._temperature(layer):
                layer.set_temperature(temperature)
            else:
                layer.end_exploration()
            # A start that each layer finds by itself begins with the first step.
            if arrival > 0 or (arrival < 0 and self.current_step):
                layer.set_base_sparsity(self.sparsity(layer.config.base_sparsity, arrival))


def _has_start(layer: BlockSparseAdaptive) -> bool:
    """Whether a layer may begin dense and move by itself."""
    return layer.budget.by_share and layer.learns_by_mass


def _check(state: Mapping[str, Any]) -> None:
    """Raises unless a state may be taken: it may come from a file."""
    # Layers hold their temperature in float32.
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    given = [n for n in ("initial_temperature", "final_temperature") if state[n] is not None]
    for name in (*given, "initial_sparsity"):
        value = state[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {short_repr(value)}.")
    for name in given:
        if not least <= state[name] <= most:
            raise ValueError(
                f"{name} must be positive and finite in float32, got {short_repr(state[name])}."
            )
    optional = ("sparsity_warmup_steps", "dense_steps", "explore_steps")
    named = [name for name in optional if state[name] is not None]
    for name in ("annealing_steps", "current_step", *named):
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
    if not isinstance(state["arrivals"], list):
        raise TypeError(f"arrivals must be a list, got {short_repr(state['arrivals'])}.")
    for arrival in state["arrivals"]:
        if -1 - as_int("an entry of arrivals", arrival) > state["current_step"]:
            raise ValueError(
                f"arrivals must be steps, or -1 - s with a step s that was, got "
                f"{short_repr(arrival)}."
            )


def _adaptive_layers(model: nn.Module) -> list[BlockSparseAdaptive]:
    return [module for module in model.modules() if isinstance(module, BlockSparseAdaptive)]
