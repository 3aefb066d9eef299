"""What changes of an adaptive layer while it trains: temperature, sparsity and thresholds.

Schedules and calibrations set these values from outside; they are saved with the weights and keep
their precision when the layer moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.nn.block_sparse import SelectionInputs
from dilated_attention_pytorch.nn.row_budgets import (
    DensityRecord,
    row_lengths,
    threshold_floor,
)
from dilated_attention_pytorch.nn.scoring_layer import ScoringLayer
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import make_mask
from dilated_attention_pytorch.selection.bounds import halvings
from dilated_attention_pytorch.selection.budget import top_p_budget
from dilated_attention_pytorch.selection.threshold import ThresholdSample, ThresholdTable


class ScheduledLayer(ScoringLayer):
    """A scoring layer whose temperature and budgets are set while it trains."""

    temperature: Tensor
    base_sparsity: Tensor
    top_p: Tensor
    thresholds: Tensor

    def add_settings(self) -> None:
        """Registers them, behind the scorer's weights, at the config's values."""
        config, pattern_heads = self.config, self.pattern_heads
        if config.budget == "adaptive":
            # Half the base budget for repeated content, one and a half for unrelated content.
            self.budget_offset = nn.Parameter(torch.full((pattern_heads,), 0.5))
            self.budget_gain = nn.Parameter(torch.ones(pattern_heads))
        if config.learnable_temperature:
            self.log_temperature = nn.Parameter(torch.zeros(()))
        self.register_buffer("temperature", torch.tensor(float(config.temperature)))
        self.register_buffer("base_sparsity", torch.tensor(float(config.base_sparsity)))
        self.register_buffer("top_p", torch.tensor(float(config.top_p)))
        if config.budget == "threshold":
            # Rows of tokens, ascending, and the threshold, or one for each head.
            self.register_buffer("thresholds", torch.zeros(0, 2, dtype=torch.float64))
        self._note_densest(1 - config.base_sparsity)
        self._table: ThresholdTable | None = None
        self._record = DensityRecord()

    def temperature_factor(self) -> Tensor | float:
        """The learned factor on the temperature (1.0 without ``learnable_temperature``)."""
        return self.log_temperature.exp() if self.config.learnable_temperature else 1.0

    def effective_temperature(self) -> Tensor:
        """``max(min_temperature, schedule * learned factor)``, 0-dim."""
        return (self.temperature * self.temperature_factor()).clamp(min=self.config.min_temperature)

    def set_temperature(self, value: float) -> None:
        """Sets the scheduled temperature; :class:`AdaptiveSparsityTrainer` calls it.

        Raises:
            ValueError: If it is not positive and finite.
        """
        if not 0 < value < math.inf:
            raise ValueError(f"value must be a positive, finite temperature, got {value}.")
        self.temperature.fill_(value)

    def set_base_sparsity(self, value: float) -> None:
        """Sets the mean sparsity to meet, e.g. for a warm-up from dense or by length.

        Raises:
            ValueError: If it is not in [0, 1), or ``num_selected_blocks`` takes its place.
        """
        check_sparsity("value", value)
        if self.config.num_selected_blocks is not None and value != self.config.base_sparsity:
            raise ValueError(
                "base_sparsity has no effect with num_selected_blocks="
                f"{self.config.num_selected_blocks}; configure one of the two to schedule sparsity."
            )
        self._record.settle()
        self.base_sparsity.fill_(value)
        self._note_densest(1 - value)

    def _note_densest(self, share: float) -> None:
        """Keeps what sizes are derived from beside the buffer, whose value may be on a device."""
        self.densest = share
        # torch.compile specialises on integers that it reads of a module, so that one is needed
        # that seldom moves; a float that moves would become a symbol, and sizes with it.
        self.halvings = halvings(share)
        self.keeps_all = share == 1

    def share_by_content(self, keep: Tensor, factor: Tensor) -> Tensor:
        """The base budget's share times the rows' own factors; all of it where nothing is left out.

        Args:
            keep: ``1 - base_sparsity``, ``(b, h, i)``.
            factor: By content, likewise.
        """
        return keep if self.keeps_all else (keep * factor).clamp(max=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        names = ["temperature", "base_sparsity", "top_p"]
        if self.config.budget == "threshold":
            names.append("thresholds")
        settings = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for name, value in settings.items():
            if value.is_meta and not getattr(self, name).is_meta:
                # Made without values: they are the config's.
                value = torch.tensor(float(getattr(self.config, name)), device="cpu")
            # Moves with the layer but keeps its precision: 0.9 in bfloat16 is 0.8984.
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(prefix + "thresholds")
        if saved is not None and self.config.budget == "threshold":
            # There may be more or fewer lengths than here.
            self.thresholds = self.thresholds.new_empty(saved.shape)
            self._table = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.base_sparsity.is_meta:
            self._note_densest(1 - float(self.base_sparsity))

    def threshold_sample(self, inputs: SelectionInputs) -> ThresholdSample:
        """What a calibration of ``budget="threshold"`` needs of these inputs."""
        return self._sample(inputs, self.score(inputs)[0])

    def _sample(self, inputs: SelectionInputs, scores: Tensor) -> ThresholdSample:
        candidates, lengths = inputs.candidates, row_lengths(self, inputs)
        share = lengths.float() / inputs.mask.kv_len if isinstance(lengths, Tensor) else None
        return ThresholdSample.of(
            scores, candidates.scored, candidates.forced, inputs.rows.num_allowed,
            threshold_floor(inputs, self.config.threshold_floor, 1 - self.densest), share=share,
        )  # fmt: skip

    def set_thresholds(self, table: ThresholdTable) -> None:
        """Sets the thresholds of ``budget="threshold"``; they are saved with the weights.

        Raises:
            ValueError: If the budget is another one.
        """
        if self.config.budget != "threshold":
            raise ValueError(f"thresholds need budget='threshold', got {self.config.budget!r}.")
        rows = table.rows()
        if len(rows[0]) - 1 not in (1, self.pattern_heads):
            raise ValueError(
                f"thresholds must be one for all heads or {self.pattern_heads}, one for each "
                f"pattern head, got {len(rows[0]) - 1}."
            )
        device = self.base_sparsity.device
        self.thresholds = torch.tensor(rows, dtype=torch.float64, device=device)
        self._table = table

    def threshold_table(self) -> ThresholdTable:
        # Kept on the host: reading the buffer would wait for the device in every pass.
        if self._table is None:
            if len(self.thresholds) == 0:
                raise RuntimeError(
                    "budget='threshold' needs thresholds: calibrate or load them first "
                    "(set_thresholds)."
                )
            self._table = ThresholdTable.from_rows(self.thresholds.tolist())
        return self._table

    def record_density(self, exact: Tensor, rows: Any, rounded: Tensor | None) -> None:
        """Notes the budgets; their sums are left to get_sparsity_loss, not of every step."""
        self._record = DensityRecord(exact, rows.num_allowed, rounded, self.base_sparsity)

    def get_sparsity_loss(self) -> Tensor:
        r"""How far the last forward pass was from ``base_sparsity``.

        :math:`(\text{density} / (1 - \text{base\_sparsity}) - 1)^2`: zero at the target, growing on
        both sides. Trains gain and offset of the adaptive budget, or the scores behind ``top_p``;
        a fixed budget gives a constant.

        Returns:
            A 0-dim tensor.

        Raises:
            RuntimeError: If no forward pass has run.
        """
        return self._record.excess().square()

    @torch.no_grad()
    def calibrate_top_p(
        self,
        query: Tensor,
        key: Tensor,
        *,
        is_causal: bool = False,
        key_lengths: Tensor | None = None,
    ) -> float:
        """Finds the share p at which ``budget="top_p"`` meets ``base_sparsity`` on a sample.

        Bisection on p; heads and rows with spread-out scores keep more than others.

        Args:
            query: Sample input as for the forward pass.
            key: Likewise.
            is_causal: As in the forward pass.
            key_lengths: As in the forward pass.

        Returns:
            p, which is also stored in ``top_p`` and saved with the weights.

        Raises:
            ValueError: If the budget is another one.
        """
        if self.config.budget != "top_p":
            raise ValueError(f"calibrate_top_p needs budget='top_p', got {self.config.budget!r}.")
        self.check_inputs(query, key, key)
        mask = make_mask(
            query.shape[0], query.shape[1], key.shape[1], device=query.device,
            causal=is_causal, key_lengths=key_lengths,
        )  # fmt: skip
        diagonal = is_causal or query.shape[1] == key.shape[1]
        inputs = self._inputs(query, key, mask, None, diagonal, None)
        scores, _ = self.score(inputs)
        scored = inputs.candidates.scored
        forced = inputs.candidates.forced.sum(-1).expand(scores.shape[:3]).sum()
        allowed = inputs.rows.num_allowed.expand(scores.shape[:3]).sum()
        goal = float((1 - self.base_sparsity) * allowed - forced)
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            if float(top_p_budget(scores, scored, middle).sum()) > goal:
                high = middle
            else:
                low = middle
        self.top_p.fill_(max(low, 1e-6))
        return float(self.top_p)
