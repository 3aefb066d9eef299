"""SelectorLayer: a scorer, a budget, and the settings that training moves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig, check_sparsity
from dilated_attention_pytorch.nn.budget_layer import BudgetLayer, Scored, setting
from dilated_attention_pytorch.nn.budgets import budget_of
from dilated_attention_pytorch.nn.buffers import host_property, readable
from dilated_attention_pytorch.nn.held_budget import (
    FIRST_HEAD,
    initial_state,
    mark_pass,
    watch_heads,
)
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.nn.state import Memory, NewestRow, SelectorState
from dilated_attention_pytorch.runtime import FormerScalars
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer
from dilated_attention_pytorch.scoring.summaries import block_summaries, exact_dtype, past_windows


class Scoring(ABC):
    """How candidates are rated: in a pass, and for the newest row of a generation.

    It has no state: weights are those of the layer that it is asked for. A new kind is a class
    here and an entry in ``scoring_of``.

    Attributes:
        by_summaries: Scores are those of summaries, which decoding keeps for every block. False:
            of tokens, which decoding reads in the cache.
    """

    by_summaries: bool

    @abstractmethod
    def make(self, layer: SelectorLayer) -> ImportanceScorer | LowRankScorer:
        """The module with the weights of a new layer, ``layer.scorer``."""

    @abstractmethod
    def score(
        self, layer: SelectorLayer, inputs: SelectionInputs, *, kernels: bool, narrow: bool = False
    ) -> Scored:
        """Rates the candidates of a pass, inside of a call of the layer.

        Args:
            layer: Whose weights.
            inputs: What is chosen from.
            kernels: Rate with the fused kernels.
            narrow: Of a hierarchy rate what lies in the super-blocks that it keeps; False: all.
        """

    @abstractmethod
    def unsupported_reason(self, layer: SelectorLayer, inputs: SelectionInputs) -> str | None:
        """Why the fused kernels cannot rate these, where the layer may use kernels; or None."""

    @abstractmethod
    def encode(
        self, layer: SelectorLayer, key: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What decoding keeps of blocks of keys ``(b, m, g, d)``: encoded summaries, and means.

        Encoded keys ``(b, p, j, e)``, each of its block alone; none (p = e = 0) where scores read
        tokens. Means ``(b, j, g, d)``, for budgets by content.
        """

    @abstractmethod
    def newest(
        self,
        layer: SelectorLayer,
        memory: Memory,
        row: NewestRow,
        numbers: Tensor | None,
        cached: CachedKeys | None,
        blocks: int,
    ) -> list[Tensor]:
        """Scores ``(b, p, 1, c)`` of the newest row, as a pass over everything would give them.

        With ``peak_share`` also the peaks.

        Args:
            layer: Whose weights.
            memory: Of everything so far.
            row: The newest row of each sample.
            numbers: Key blocks of the columns; None: all.
            cached: The keys, where scores read tokens.
            blocks: Key blocks that there is room for.
        """


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where everything is computed in the dtype that it has."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class CachedKeys:
    """The keys that a choice may read, and how many of the row's queries it must rate them by.

    Attributes:
        key: ``(b, capacity, g, d)``: the cache, with the newest tokens.
        starts: ``(b,)`` integers: place of token 0, or None: 0.
        newest: Whether the row's newest sampled query alone is rated, beside the mass that those
            before it have given; otherwise all of them are.
    """

    def __init__(self, layer: SelectorLayer, state: SelectorState, key: Tensor) -> None:
        self.key, self.starts = key, state.starts
        self.newest = layer.sums_mass and state.listed

    def blocks(self, count: int, size: int) -> Tensor:
        """The keys of the first ``count`` blocks of each sample, or all that there is room for."""
        tokens = min(count * size, self.key.shape[1])
        if self.starts is None:
            return self.key[:, :tokens]
        place = self.starts.long()[:, None] + torch.arange(tokens, device=self.key.device)
        place = place.clamp(max=self.key.shape[1] - 1)[..., None, None]
        return self.key.gather(1, place.expand(-1, -1, *self.key.shape[2:]))


class SelectorLayer(FormerScalars, BudgetLayer):
    """A layer with a scorer whose temperature and budgets are set while it trains.

    Schedules and calibrations set these values from outside; they are saved with the weights and
    keep their precision when the layer moves.

    Args:
        config: Settings.
        scoring: How its candidates are rated.
        segment_lengths: Tokens per segment of each dilation group; None: choose from all blocks.
        dilation_rates: Rate of each group.
        num_heads: Query heads.
        head_dim: Size of a head.
        num_kv_heads: Key and value heads; None: ``num_heads``.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        backend: Of :func:`block_sparse_attention`.

    Raises:
        ValueError: If sizes are not positive or do not fit.
    """

    temperature: Tensor
    # Whether a warning has said that nothing is left to choose.
    told_of_nothing = False

    def __init__(
        self,
        config: AdaptiveConfig,
        scoring: Scoring,
        *,
        segment_lengths: Sequence[int] | None,
        dilation_rates: Sequence[int] | None,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None,
        scale: float | None,
        backend: str,
    ) -> None:
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        pattern_heads = num_heads
        if config.share_across_heads:
            pattern_heads = 1
        elif config.share_within_kv_group:
            pattern_heads = kv_heads
        super().__init__(
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            block_size=config.block_size,
            pattern_heads=pattern_heads,
            num_local_blocks=config.num_local_blocks,
            num_sink_blocks=config.num_sink_blocks,
            scale=scale,
            backend=backend,
        )
        self.config, self.scoring = config, scoring
        self.past = config.query_scope == "past"
        self.threshold_floor = config.threshold_floor
        self.scorer = scoring.make(self)
        if config.hierarchy and self.segment_lengths is not None:
            raise ValueError(
                "hierarchy chooses among all blocks and segment_lengths limits them; give one."
            )
        self.coarse_scorers = nn.ModuleList(self.new_network() for _ in config.hierarchy)
        if "attention" in config.pooling and scoring.by_summaries:
            self.query_pool = nn.Parameter(torch.randn(num_heads, head_dim) * head_dim**-0.5)
            self.key_pool = nn.Parameter(torch.randn(self.num_kv_heads, head_dim) * head_dim**-0.5)
        if config.budget == "adaptive":
            # With num_selected_blocks they have no part, and are in states that were saved.
            self.add_budget_terms()
        if config.learnable_temperature:
            self.log_temperature = nn.Parameter(torch.zeros(1))
        self.register_buffer("temperature", setting(config.temperature))
        budget = budget_of(config.budget, config.num_selected_blocks)
        self.add_budget(budget, config.base_sparsity)
        state = initial_state(self.pattern_heads).to(self.temperature.device)
        self.register_buffer("budget_state", state)

    def new_network(self) -> ImportanceScorer:
        """A network that compares summaries, with weights of its own."""
        config = self.config
        return ImportanceScorer(
            self.head_dim * len(config.pooling),
            self.num_heads,
            kind=config.scorer,
            hidden_dim=config.hidden_dim,
            num_layers=config.num_layers,
            share_across_heads=config.share_across_heads,
            heads_per_pattern=self.num_heads // self.pattern_heads,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name, fresh = prefix + "budget_state", initial_state(self.pattern_heads)
        if prefix + "temperature" in state_dict:
            # Saved before there was one, all went by likeness; before it knew heads, all mattered.
            saved = state_dict.get(name, fresh)
            if saved.shape == (len(fresh), FIRST_HEAD):
                saved = torch.cat([saved, fresh[:, FIRST_HEAD:].to(saved)], 1)
            state_dict = {**state_dict, name: saved}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def initial_buffers(self) -> dict[str, Tensor]:
        """The values of the config, and no thresholds."""
        return {**super().initial_buffers(), "temperature": setting(self.config.temperature).cpu()}

    @property
    def sums_mass(self) -> bool:
        """Whether the queries of a row add to its scores one after another while decoding."""
        return not self.scoring.by_summaries and not self.past

    @property
    def keeps_summaries(self) -> bool:
        """Whether decoding keeps summaries of key blocks, the scorer's or those of budgets."""
        return self.scoring.by_summaries or self.budget.by_content

    def exactly(self, device: torch.device) -> AbstractContextManager[Any]:
        """Summaries are scored in float32 under autocast too, as by the fused kernels."""
        return without_autocast(device) if self.scoring.by_summaries else nullcontext()

    def unsupported_reason(self, inputs: SelectionInputs) -> str | None:
        """Why this selection takes the PyTorch path, or None if the fused kernels run it."""
        place = self.place_unsupported_reason(inputs)
        if place is not None:
            return place
        kind = self.config.estimator
        if kind != "mass":
            return f"estimator {kind!r} needs the gradient of all candidates' scores"
        return self.scoring.unsupported_reason(self, inputs)

    def score(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor]:
        """Scores of all candidates ``(b, h, i, c)``, and the key blocks' means."""
        return self.called(lambda *_: self.scores_of(inputs), inputs.query, inputs.key, inputs.key)

    def scores_of(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor]:
        """:meth:`score`, inside a call of the layer."""
        scored = self.scoring.score(self, inputs, kernels=False)
        return scored.scores, scored.key_means()

    @property
    def mean_at(self) -> int | None:
        """Where the means begin in a summary; None: it holds none."""
        pooling = self.config.pooling
        return pooling.index("mean") * self.head_dim if "mean" in pooling else None

    def scope(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor | None]:
        """The query tokens that each row may be judged by, and which of them are real."""
        query, valid = inputs.query, inputs.query_valid
        if self.looks_back(inputs.mask):
            return past_windows(query, self.block_size, valid, inputs.mask.document_ids)
        return query, valid

    def pool_queries(self, query: Tensor, valid: Tensor | None) -> Tensor:
        """Summaries ``(b, i, num_heads, s)`` of blocks of queries ``(b, n, num_heads, d)``."""
        return self._pool(query, valid, "query_pool")

    def pool_keys(self, key: Tensor, valid: Tensor | None) -> Tensor:
        """Summaries ``(b, j, g, s)`` of blocks of keys ``(b, m, g, d)``."""
        return self._pool(key, valid, "key_pool")

    def _pool(self, x: Tensor, valid: Tensor | None, pool: str) -> Tensor:
        pooling = self.config.pooling
        return block_summaries(
            x, self.block_size, pooling=pooling, valid=valid, dtype=exact_dtype(x.dtype),
            pool_query=getattr(self, pool) if "attention" in pooling else None,
        )  # fmt: skip

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

    @property
    def draws(self) -> bool:
        """Whether passes draw random numbers: noise, random blocks, or what they are known by."""
        return self.moves_budgets or self.explores

    def mark(self, query: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """By a random number, the queries and the scorer's weights, where budgets move."""
        if not self.moves_budgets:
            return None
        return mark_pass(query, self.scorer.checksum, generator)

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

    @property
    def teaches(self) -> bool:
        """Whether the backward pass of this forward pass teaches the selector by the mass."""
        return self.training and torch.is_grad_enabled() and self.learns_by_mass

    def watched_query(self, query: Tensor) -> Tensor:
        """Before scores decide on budgets, measures which heads the loss depends on."""
        if not (self.teaches and self.budget.by_content and self.keeps_all and query.requires_grad):
            return query
        return watch_heads(query, self.budget_state)

    @property
    def learns_by_mass(self) -> bool:
        """Whether backward passes in training teach the selector by the mass of the tiles."""
        return self.config.estimator == "mass" and self.config.selector_weight > 0

    def seed(self, inputs: SelectionInputs) -> Tensor:
        """Draws the seed of a kernel's noise on the device, 0-dim int64."""
        return torch.randint(
            2**62, (), device=inputs.query.device, generator=inputs.generator, dtype=torch.int64
        )
