"""BlockSparseAdaptive: attention that chooses its blocks from the content, and learns to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig, check_sparsity
from dilated_attention_pytorch.nn.block_sparse import (
    BlockSparseLayer,
    Selection,
    SelectionInputs,
)
from dilated_attention_pytorch.nn.fused_selection import MAX_BUDGET_FACTOR, select_with_kernels
from dilated_attention_pytorch.nn.hierarchical_selection import ChosenLevel, coarse_probes, narrow
from dilated_attention_pytorch.ops.block_selection import kernel_refusal
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import make_mask
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer
from dilated_attention_pytorch.scoring.summaries import block_summaries, past_windows
from dilated_attention_pytorch.selection.bounds import (
    halvings,
    most_scored_blocks,
    most_visible_blocks,
)
from dilated_attention_pytorch.selection.budget import (
    content_complexity,
    round_budget,
    top_p_budget,
    water_level_budget,
)
from dilated_attention_pytorch.selection.gumbel import gumbel_noise, relaxed_top_k, uniform_noise
from dilated_attention_pytorch.selection.mass_target import mass_target_probe
from dilated_attention_pytorch.selection.top_k import choose_top_k


@dataclasses.dataclass(eq=False)
class _Record:
    """What the last forward pass left for :meth:`BlockSparseAdaptive.get_sparsity_loss`."""

    exact: Tensor | None = None
    allowed: Tensor | None = None
    rounded: Tensor | None = None
    target: Tensor | None = None

    def excess(self) -> Tensor:
        """Share of the visible tiles that the budgets take, over the target, less 1: 0-dim."""
        if self.exact is None or self.allowed is None or self.target is None:
            raise RuntimeError("get_sparsity_loss needs a forward pass first; call the layer.")
        total = self.allowed.expand(self.exact.shape).sum().clamp(min=1)
        density = self.exact.sum() / total
        if self.rounded is not None:
            # The value is what was kept; the gradient is the stand-in's.
            density = density - density.detach() + self.rounded.sum() / total
        return density / self.target - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> _Record:
        # A tensor inside an autograd graph cannot be copied, and a copy has run no forward pass.
        return _Record()

    def __reduce__(self) -> tuple[type[_Record], tuple[()]]:
        return _Record, ()


class BlockSparseAdaptive(BlockSparseLayer):
    """Block-sparse attention whose pattern is chosen from the content.

    Blocks of queries and keys are summarised, a small scorer rates the pairs, every row keeps its
    best blocks within its budget, and attention is computed over those alone. The scorer learns
    from the attention itself (``AdaptiveConfig.estimator``), together with the model.

    Causality: with ``query_scope="block"`` the *choice* for a query block sees all tokens of that
    block, later ones too; with ``"past"`` nothing later than its first token. Values are causal
    per token in both.

    Args:
        segment_lengths: Tokens per segment of each dilation group; blocks outside a common segment
            cannot be chosen, which keeps scoring linear in the length. None: choose from all.
        dilation_rates: Rate of each group.
        num_heads: Query heads.
        head_dim: Size of a head.
        adaptive_config: Settings; None: ``AdaptiveConfig()``.
        num_kv_heads: Key and value heads; None: ``num_heads``.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        backend: Of :func:`block_sparse_attention`.

    Raises:
        TypeError: If ``adaptive_config`` is something else, or segments are not integers.
        ValueError: If sizes are not positive or do not fit.

    Example:
        >>> import torch
        >>> layer = BlockSparseAdaptive([256, 512], [1, 2], num_heads=4, head_dim=16)
        >>> x = torch.randn(1, 512, 4, 16)
        >>> out, info = layer(x, x, x, is_causal=True, return_pattern=True)
        >>> out.shape, len(info["patterns"]), info["sparsity"].shape
        (torch.Size([1, 512, 4, 16]), 4, torch.Size([1, 4]))
    """

    temperature: Tensor
    base_sparsity: Tensor
    top_p: Tensor

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        num_heads: int = 8,
        head_dim: int = 64,
        adaptive_config: AdaptiveConfig | None = None,
        *,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        config = AdaptiveConfig() if adaptive_config is None else adaptive_config
        if not isinstance(config, AdaptiveConfig):
            raise TypeError(
                f"adaptive_config must be an AdaptiveConfig, got {type(config).__name__}; "
                "use AdaptiveConfig.from_dict for a dict."
            )
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
        self.config = config
        self.scorer = ImportanceScorer(
            head_dim * len(config.pooling),
            num_heads,
            kind=config.scorer,
            hidden_dim=config.hidden_dim,
            num_layers=config.num_layers,
            share_across_heads=config.share_across_heads,
            heads_per_pattern=num_heads // pattern_heads,
        )
        if config.hierarchy and self.segment_lengths is not None:
            raise ValueError(
                "hierarchy chooses among all blocks and segment_lengths limits them; give one."
            )
        self.coarse_scorers = nn.ModuleList(
            ImportanceScorer(
                head_dim * len(config.pooling), num_heads, kind=config.scorer,
                hidden_dim=config.hidden_dim, num_layers=config.num_layers,
                share_across_heads=config.share_across_heads,
                heads_per_pattern=num_heads // pattern_heads,
            )
            for _ in config.hierarchy
        )  # fmt: skip
        if "attention" in config.pooling:
            self.query_pool = nn.Parameter(torch.randn(num_heads, head_dim) * head_dim**-0.5)
            self.key_pool = nn.Parameter(torch.randn(self.num_kv_heads, head_dim) * head_dim**-0.5)
        if config.budget == "adaptive":
            # Half the base budget for repeated content, one and a half for unrelated content.
            self.budget_offset = nn.Parameter(torch.full((pattern_heads,), 0.5))
            self.budget_gain = nn.Parameter(torch.ones(pattern_heads))
        if config.learnable_temperature:
            self.log_temperature = nn.Parameter(torch.zeros(()))
        self.register_buffer("temperature", torch.tensor(float(config.temperature)))
        self.register_buffer("base_sparsity", torch.tensor(float(config.base_sparsity)))
        self.register_buffer("top_p", torch.tensor(float(config.top_p)))
        self._note_densest(1 - config.base_sparsity)
        self._record = _Record()

    def extra_repr(self) -> str:
        """Shown by ``print(layer)``."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, segment_lengths={self.segment_lengths}, "
            f"dilation_rates={self.dilation_rates}, estimator={self.config.estimator!r}, "
            f"base_sparsity={self.config.base_sparsity}, block_size={self.block_size}"
        )

    def temperature_factor(self) -> Tensor | float:
        """The learned factor on the temperature (1.0 without ``learnable_temperature``)."""
        return self.log_temperature.exp() if self.config.learnable_temperature else 1.0

    def effective_temperature(self) -> Tensor:
        """``max(min_temperature, schedule * learned factor)``, 0-dim."""
        return (self.temperature * self.temperature_factor()).clamp(min=self.config.min_temperature)

    def set_temperature(self, value: float) -> None:
        """Sets the scheduled temperature; :class:`AdaptiveSparsityTrainer` calls it."""
        if not value > 0:
            raise ValueError(f"value must be a positive temperature, got {value}.")
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
        self.base_sparsity.fill_(value)
        self._note_densest(1 - value)

    def _note_densest(self, share: float) -> None:
        """Keeps what sizes are derived from beside the buffer, whose value may be on a device."""
        self._densest = share
        # torch.compile specialises on integers that it reads of a module, so that one is needed
        # that seldom moves; a float that moves would become a symbol, and sizes with it.
        self._halvings = halvings(share)
        self._keeps_all = share == 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseAdaptive:
        settings = {name: getattr(self, name) for name in ("temperature", "base_sparsity", "top_p")}
        super()._apply(fn, recurse)
        for name, value in settings.items():
            if value.is_meta and not getattr(self, name).is_meta:
                # Made without values: they are the config's.
                value = torch.tensor(float(getattr(self.config, name)), device="cpu")
            # Moves with the layer but keeps its precision: 0.9 in bfloat16 is 0.8984.
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.base_sparsity.is_meta:
            self._note_densest(1 - float(self.base_sparsity))

    def pattern_info(self, pattern: Any) -> dict[str, Any]:
        """Adds the ``"temperature"`` in force."""
        info = super().pattern_info(pattern)
        info["temperature"] = float(self.effective_temperature().detach())
        return info

    def select(self, inputs: SelectionInputs) -> Selection:
        """Scores, budgets and chooses; see the class."""
        if self.selection_refusal(inputs) is None:
            return select_with_kernels(self, inputs)
        config = self.config
        explore = self.training and not config.hard_sparsity
        queries, keys, key_means = self.summaries(inputs)
        levels: list[ChosenLevel] = []
        if config.hierarchy:
            intervals = inputs.rule.intervals(inputs.rows)
            found, levels = narrow(
                self, inputs, intervals, queries, keys, explore=explore, kernels=False
            )
            inputs = inputs.limited_to(found)
        candidates = inputs.candidates
        scores = self.scorer(queries, keys, candidates.indices)
        budget = self._budget(inputs, scores, key_means)
        forced = candidates.forced.sum(-1, dtype=torch.int32)
        count = (budget - forced).clamp(min=0)
        bound = self._bound(inputs, count)
        ranked = scores.detach()
        if explore:
            noise = gumbel_noise(scores, inputs.generator)
            ranked = ranked + noise * self.effective_temperature().detach()
        chosen = choose_top_k(ranked, candidates.scored, count, bound)
        if explore and config.estimator == "soft":
            return self._soft(inputs, scores, noise, count, bound)
        if explore and config.num_explore_blocks:
            chosen = chosen | self._explore(inputs, chosen)
        return self._hard(inputs, scores, chosen, bound, levels)

    def selection_refusal(self, inputs: SelectionInputs) -> str | None:
        """Why this selection takes the PyTorch path, or None if the fused kernels run it."""
        config, query = self.config, inputs.query
        if self.backend not in ("auto", "triton"):
            return f"backend={self.backend!r} asks for the PyTorch path"
        if self.backend == "auto" and query.device.type != "cuda":
            return f"the PyTorch path runs on {query.device.type}"
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return "torch.func takes the PyTorch path"
        if config.estimator != "mass":
            return f"estimator {config.estimator!r} needs the gradient of all candidates' scores"
        if config.budget == "top_p":
            return "budget 'top_p' sorts the scores"
        width = inputs.rule.width(inputs.rows)
        return kernel_refusal(query.device, query.dtype, self.block_size, self.head_dim, width)

    def score(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor]:
        """Scores of all candidates ``(b, h, i, c)``, and the key blocks' means."""
        queries, keys, means = self.summaries(inputs)
        return self.scorer(queries, keys, inputs.candidates.indices), means

    def summaries(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Summaries of query and key blocks, and the key blocks' means."""
        config = self.config
        query, valid = inputs.query, inputs.query_valid
        if config.query_scope == "past" and inputs.mask.causal:
            query, valid = past_windows(query, self.block_size, valid, inputs.mask.document_ids)
        learned = "attention" in config.pooling
        queries = block_summaries(
            query, self.block_size, pooling=config.pooling, valid=valid,
            pool_query=self.query_pool if learned else None,
        )  # fmt: skip
        keys = block_summaries(
            inputs.key, self.block_size, pooling=config.pooling, valid=inputs.key_valid,
            pool_query=self.key_pool if learned else None,
        )  # fmt: skip
        if "mean" in config.pooling:
            start = config.pooling.index("mean") * self.head_dim
            means = keys[..., start : start + self.head_dim]
        else:
            means = block_summaries(
                inputs.key.detach(), self.block_size, pooling=("mean",), valid=inputs.key_valid
            )
        return queries, keys, means

    def _budget(self, inputs: SelectionInputs, scores: Tensor, key_means: Tensor) -> Tensor:
        """Blocks per row, forced ones included, int32 ``(b, h, i)``; records the density."""
        config, rows, candidates = self.config, inputs.rows, inputs.candidates
        shape, width = scores.shape[:3], inputs.rule.width(rows)
        forced = candidates.forced.sum(-1)
        limit = forced + candidates.scored.sum(-1)
        if config.hierarchy:
            # The budget depends on lengths alone, not on which super-blocks were kept.
            limit = rows.num_allowed.long()
        if config.budget == "top_p":
            rounded = forced.int() + top_p_budget(scores, candidates.scored, self.top_p)
            self.record_density(self._soft_count(scores, candidates.scored) + forced, rows, rounded)
            return rounded
        if config.num_selected_blocks is not None:
            exact = torch.minimum(forced + config.num_selected_blocks, limit).float()
            exact = exact.expand(shape)
        else:
            keep = (1 - self.base_sparsity).expand(shape)
            if config.budget == "adaptive":
                keep = (keep * self._budget_factor(inputs, key_means)).clamp(max=1)
            exact = water_level_budget(keep, forced, limit, rows, width)
        rounded = round_budget(exact, rows)
        self.record_density(exact, rows, None)
        return rounded

    def _budget_factor(self, inputs: SelectionInputs, key_means: Tensor) -> Tensor:
        """Each row's share of the base budget, ``(b, pattern heads, i)``."""
        past = self.config.query_scope == "past" and inputs.mask.causal
        complexity = content_complexity(key_means, inputs.rows, past_only=past)
        heads = self.pattern_heads
        if heads == 1:
            complexity = complexity.mean(1, keepdim=True)
        elif heads != self.num_kv_heads:
            complexity = complexity.repeat_interleave(heads // self.num_kv_heads, 1)
        factor = self.budget_offset[:, None] + self.budget_gain[:, None] * complexity
        return factor.clamp(0, MAX_BUDGET_FACTOR)

    def _soft_count(self, scores: Tensor, scored: Tensor) -> Tensor:
        """A differentiable stand-in for the number of blocks that reach the share top_p."""
        p = scores.masked_fill(~scored, torch.finfo(scores.dtype).min).softmax(-1)
        p = p.masked_fill(~scored, 0)
        # exp(entropy): how many equally scored blocks would be as spread out.
        return (-(p * p.clamp(min=1e-20).log()).sum(-1)).exp()

    def record_density(self, exact: Tensor, rows: Any, rounded: Tensor | None) -> None:
        """Notes the budgets; their sums are left to get_sparsity_loss, not of every step."""
        self._record = _Record(exact, rows.num_allowed, rounded, 1 - self.base_sparsity)

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

    def _bound(self, inputs: SelectionInputs, count: Tensor) -> int:
        """An upper bound of ``count``; on a GPU from the lengths alone, to wait for nothing."""
        if count.device.type == "cpu" and not torch.compiler.is_compiling():
            return int(count.max()) if count.numel() else 0
        return self.most_scored(inputs)

    def most_scored(self, inputs: SelectionInputs) -> int:
        """The most scored blocks that any row can get, from the lengths alone."""
        config, width = self.config, inputs.rule.width(inputs.rows)
        if config.num_selected_blocks is not None:
            return min(config.num_selected_blocks, width)
        if inputs.mask.per_sample or config.budget == "top_p":
            return width
        mask, compiling = inputs.mask, torch.compiler.is_compiling()
        factor = MAX_BUDGET_FACTOR if config.budget == "adaptive" else 1.0
        share = 0.5**self._halvings if compiling else self._densest
        keep = min(share * factor, 1.0)
        if self.segment_lengths is None:
            offset = mask.query_offset
            # An int: with one offset per sample the width was returned above.
            most = most_visible_blocks(
                mask.q_len, mask.kv_len, mask.causal, cast(int, offset), self.block_size, keep
            )
            return min(width, most)
        if compiling:
            # Counting the lattice takes tensors, whose values would be symbols. Candidates of
            # segments do not grow with the length, so this stays small.
            return width
        return min(
            width,
            most_scored_blocks(
                mask.q_len,
                mask.kv_len,
                mask.causal,
                int(mask.query_offset),
                inputs.rows.has_diagonal,
                self.block_size,
                self.segment_lengths,
                self.dilation_rates,
                self.pattern_heads,
                config.num_local_blocks,
                config.num_sink_blocks,
                keep,
            ),
        )

    def _explore(self, inputs: SelectionInputs, chosen: Tensor) -> Tensor:
        """Uniformly random blocks that were not chosen."""
        lottery = uniform_noise(chosen, inputs.generator)
        extra = self.config.num_explore_blocks
        free = inputs.candidates.scored & ~chosen
        count = torch.full(chosen.shape[:3], extra, device=chosen.device)
        return choose_top_k(lottery, free, count, extra)

    def _soft(
        self, inputs: SelectionInputs, scores: Tensor, noise: Tensor, count: Tensor, bound: int
    ) -> Selection:
        """All candidates, each gated by the logarithm of its relaxed top-k weight."""
        scored = inputs.candidates.scored.expand(scores.shape)
        logits = (scores + noise).masked_fill(~scored, -torch.inf)
        count = torch.minimum(count, scored.sum(-1))
        weights = relaxed_top_k(logits, count, bound, self.effective_temperature())
        gate = weights.clamp(min=1e-8).log().masked_fill(~scored, 0)
        everything = scored | inputs.candidates.forced
        pattern, slots = self.build_pattern(inputs, everything, inputs.candidates.width)
        return Selection(pattern, block_bias=gate.gather(-1, slots))

    def _hard(
        self,
        inputs: SelectionInputs,
        scores: Tensor,
        chosen: Tensor,
        bound: int,
        levels: list[ChosenLevel],
    ) -> Selection:
        """Only the chosen blocks; the estimator decides how the scores hear of it."""
        config, candidates = self.config, inputs.candidates
        everything = chosen | candidates.forced
        if everything.device.type == "cpu" and not torch.compiler.is_compiling():
            width = int(everything.sum(-1).max()) if everything.numel() else 0
        else:
            most_forced = config.num_sink_blocks + 2 * config.num_local_blocks + 2
            width = min(candidates.width, bound + config.num_explore_blocks + most_forced)
        complete = config.budget == "fixed" and config.num_selected_blocks is None
        complete = complete and self._keeps_all
        pattern, slots = self.build_pattern(inputs, everything, width, complete=complete)
        learning = self.training and torch.is_grad_enabled()
        used = pattern.slot_used()
        scored = candidates.scored.expand(scores.shape).gather(-1, slots) & used
        if config.estimator == "mass":
            if not learning or config.selector_weight == 0:
                return Selection(pattern)
            kept = scores.gather(-1, slots) / self.temperature_factor()
            return Selection(pattern, mass_probe=self.mass_probe(kept, scored, pattern, levels))
        passes_through = config.estimator == "straight_through" or config.hard_sparsity
        if config.estimator == "soft" and not (self.training and config.hard_sparsity):
            return Selection(pattern)
        if passes_through and not learning:
            return Selection(pattern)
        allowed = candidates.scored.expand(scores.shape)
        mean = scores.masked_fill(~allowed, 0).sum(-1) / allowed.sum(-1).clamp(min=1)
        bias = (scores.gather(-1, slots) - mean[..., None]).masked_fill(~scored, 0)
        bias = bias / self.temperature_factor()
        if passes_through:
            bias = bias - bias.detach()
        return Selection(pattern, block_bias=bias)

    def mass_probe(
        self, kept: Tensor, scored: Tensor, pattern: BlockPattern, levels: list[ChosenLevel]
    ) -> Tensor:
        """What takes the tile mass to the scores of the kept tiles and of the coarse levels.

        Args:
            kept: ``(b, p, i, k)`` scores of the kept tiles over the learned temperature factor.
            scored: Booleans: tiles that are not forced.
            pattern: The kept tiles.
            levels: Of the hierarchy; empty without.
        """
        weight, rows = self.config.selector_weight, kept.shape[0] * kept.shape[2]
        probe = mass_target_probe(kept, scored, weight, rows)
        if not levels:
            return probe
        factor = self.temperature_factor()
        return probe + coarse_probes(
            levels, pattern.kv_indices, scored, weight / max(rows, 1), factor
        )

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
        self._check(query, key, key)
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
