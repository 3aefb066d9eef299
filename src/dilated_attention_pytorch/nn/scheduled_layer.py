"""What changes of an adaptive layer while it trains: temperature, sparsity and thresholds.

Schedules and calibrations set these values from outside; they are saved with the weights and keep
their precision when the layer moves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.nn.block_sparse import SelectionInputs
from dilated_attention_pytorch.nn.budget_layer import setting
from dilated_attention_pytorch.nn.held_budget import HeldBudget, initial_state, scores_may_decide
from dilated_attention_pytorch.nn.host_values import host_property, readable
from dilated_attention_pytorch.nn.row_budgets import (
    DensityRecord,
    row_lengths,
    threshold_floor,
)
from dilated_attention_pytorch.nn.scoring_layer import ScoringLayer
from dilated_attention_pytorch.runtime import FormerScalars, tracing
from dilated_attention_pytorch.selection.threshold import ThresholdSample

# Factors on the odds at which repeated and unrelated contents are kept: a base of 0.9 becomes 0.95
# and 0.85.
_REPEATED, _UNRELATED = 9 / 19, 27 / 17


class ScheduledLayer(FormerScalars, ScoringLayer):
    """A scoring layer whose temperature and budgets are set while it trains."""

    temperature: Tensor
    budget_state: Tensor

    def add_settings(self) -> None:
        """Registers them, behind the scorer's weights, at the config's values."""
        config, pattern_heads = self.config, self.pattern_heads
        if config.budget == "adaptive":
            self.budget_offset = nn.Parameter(torch.full((pattern_heads,), _REPEATED))
            self.budget_gain = nn.Parameter(torch.full((pattern_heads,), _UNRELATED - _REPEATED))
        if config.learnable_temperature:
            self.log_temperature = nn.Parameter(torch.zeros(1))
        self.register_buffer("temperature", setting(config.temperature))
        self.add_budget(config.base_sparsity, config.budget)
        self.register_buffer("budget_state", initial_state().to(self.temperature.device))
        self._record = DensityRecord()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name = prefix + "budget_state"
        if prefix + "temperature" in state_dict and name not in state_dict:
            # Saved before there was one: all went by likeness.
            state_dict = {**state_dict, name: initial_state()}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def initial_buffers(self) -> dict[str, Tensor]:
        """The values of the config, and no thresholds."""
        temperature = setting(self.config.temperature).cpu()
        own = {"temperature": temperature, "budget_state": initial_state()}
        return {**super().initial_buffers(), **own}

    def temperature_factor(self) -> Tensor | float:
        """The learned factor on the temperature (1.0 without ``learnable_temperature``)."""
        return self.log_temperature.exp()[0] if self.config.learnable_temperature else 1.0

    def effective_temperature(self) -> Tensor:
        """``max(min_temperature, schedule * learned factor)``, 0-dim; 0 after the exploration."""
        product = self.temperature * self.temperature_factor()
        over = self.temperature == 0
        return product.clamp(min=self.config.min_temperature).masked_fill(over, 0)

    def set_temperature(self, value: float) -> None:
        """Sets the scheduled temperature; :class:`AdaptiveSparsityTrainer` calls it.

        Raises:
            ValueError: If it is not positive and finite.
            RuntimeError: If the buffer is offloaded, so that what is written is lost.
        """
        if not 0 < value < math.inf:
            raise ValueError(f"value must be a positive, finite temperature, got {value}.")
        self._write_temperature(value)

    def end_exploration(self) -> None:
        """From now on training chooses as evaluation does, without noise and random blocks.

        The temperature is 0, and saved with the weights; :meth:`set_temperature` undoes it.

        Raises:
            ValueError: If the estimator is not ``"mass"``.
            RuntimeError: If the buffer is offloaded, so that what is written is lost.
        """
        if self.config.estimator != "mass":
            raise ValueError(
                f"estimator={self.config.estimator!r} learns by its noise, which cannot end; "
                "end_exploration needs estimator='mass'."
            )
        self._write_temperature(0.0)

    def _write_temperature(self, value: float) -> None:
        self.writable("temperature").fill_(value)
        self._host.note("temperature", self.temperature, value > 0)

    def set_base_sparsity(self, value: float) -> None:
        """Sets the mean sparsity to meet, e.g. for a warm-up from dense or by length.

        Raises:
            ValueError: If it is not in [0, 1), or ``num_selected_blocks`` takes its place.
            RuntimeError: If the buffer is offloaded, so that what is written is lost.
        """
        if self.config.num_selected_blocks is not None and value != self.config.base_sparsity:
            check_sparsity("value", value)
            raise ValueError(
                "base_sparsity has no effect with num_selected_blocks="
                f"{self.config.num_selected_blocks}; configure one of the two to schedule sparsity."
            )
        super().set_base_sparsity(value)

    def held_budget(self, mark: Tensor | None = None) -> HeldBudget | None:
        """The numbers that hold the sparsity in this forward pass; None for other budgets.

        Args:
            mark: Of a pass in training, which moves them; see :class:`SelectionInputs`.
        """
        if self.config.budget != "adaptive":
            return None
        return HeldBudget.of(self.budget_state, mark, scores_decide=self._scores_may_decide())

    @property
    def moves_budgets(self) -> bool:
        """Whether a pass changes what the next one goes by."""
        return self.training and self.config.budget == "adaptive"

    @property
    def draws(self) -> bool:
        """Whether passes draw random numbers: noise, random blocks, or what they are known by."""
        return self.moves_budgets or self.explores

    # As the host reads it; outside of torch.compile a plain read.
    _outer_temperature = host_property(lambda layer: layer.temperature)
    _outer_explores = host_property(lambda layer: layer._read_explores())

    @property
    def explores(self) -> bool:
        """Whether passes rank with noise and read random blocks: in training, until the end."""
        if not self.training or self.config.hard_sparsity:
            return False
        compiling = torch.compiler.is_compiling()
        if compiling and self._outer_temperature is not self.temperature:
            # Of a functional_call inside of a compiled function.
            return True
        found: bool = self._outer_explores
        return found

    def _read_explores(self) -> bool:
        if not readable(self.temperature):
            return True
        return self._host.read("temperature", self.temperature, lambda x: bool(x > 0))

    def _scores_may_decide(self) -> bool:
        # Training moves the buffer at every step; a program that is recorded outlives its values.
        if self.training or tracing() or not readable(self.budget_state):
            return True
        return self._host.read("budget_state", self.budget_state, scores_may_decide)

    @property
    def learns_by_mass(self) -> bool:
        """Whether backward passes in training teach the selector by the mass of the tiles."""
        return self.config.estimator == "mass" and self.config.selector_weight > 0

    def budget_terms(self, held: HeldBudget) -> tuple[Tensor, Tensor]:
        """Gain and offset of the rows' factors."""
        return self.budget_gain.float() * held.level, self.budget_offset.float() * held.level

    def threshold_sample(self, inputs: SelectionInputs) -> ThresholdSample:
        """What a calibration of ``budget="threshold"`` needs of these inputs."""
        return self.called(
            lambda *_: self._sample(inputs, self.scores_of(inputs)[0]),
            inputs.query, inputs.key, inputs.key,
        )  # fmt: skip

    def _sample(self, inputs: SelectionInputs, scores: Tensor) -> ThresholdSample:
        candidates, lengths = inputs.candidates, row_lengths(self, inputs)
        share = lengths.float() / inputs.mask.kv_len if isinstance(lengths, Tensor) else None
        return ThresholdSample.of(
            scores, candidates.scored, candidates.forced, inputs.rows.num_allowed,
            threshold_floor(inputs, self.config.threshold_floor, 1 - self.densest), share=share,
        )  # fmt: skip

    def record_density(self, budget: Tensor, rows: Any) -> None:
        """Notes the budgets; their sums are left to get_sparsity_loss, not of every step."""
        # A copy: what holds the sparsity may be written before the loss is asked for.
        target = self.base_sparsity.clone()
        self._record = DensityRecord(budget, rows.num_allowed, target)

    def get_sparsity_loss(self) -> Tensor:
        r"""How far the last forward pass was from ``base_sparsity``.

        :math:`(\text{density} / (1 - \text{base\_sparsity}) - 1)^2`: zero at the target, growing on
        both sides. Trains gain and offset of the adaptive budget; other budgets give a constant.

        Returns:
            A 0-dim tensor.

        Raises:
            RuntimeError: If no forward pass has run.
        """
        return self._record.excess().square()
