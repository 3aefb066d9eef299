"""BlockSparseAdaptive: attention that chooses its blocks from the content, and learns to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig, check_sparsity
from dilated_attention_pytorch.nn import decoding
from dilated_attention_pytorch.nn.block_sparse import (
    BlockSparseLayer,
    Selection,
    SelectionInputs,
)
from dilated_attention_pytorch.nn.estimators import (
    explore_blocks,
    hard_selection,
    soft_selection,
)
from dilated_attention_pytorch.nn.fused_selection import select_with_kernels
from dilated_attention_pytorch.nn.hierarchical_selection import ChosenLevel, narrow
from dilated_attention_pytorch.nn.row_budgets import DensityRecord, row_budgets, scored_bound
from dilated_attention_pytorch.nn.selector_state import SelectorState
from dilated_attention_pytorch.ops.block_selection import kernel_refusal
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import make_mask
from dilated_attention_pytorch.scoring.prototypes import PrototypeScorer
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer
from dilated_attention_pytorch.scoring.summaries import block_summaries, past_windows
from dilated_attention_pytorch.scoring.training_free import antidiagonal_scores
from dilated_attention_pytorch.selection.bounds import (
    halvings,
)
from dilated_attention_pytorch.selection.budget import (
    top_p_budget,
)
from dilated_attention_pytorch.selection.gumbel import gumbel_noise
from dilated_attention_pytorch.selection.threshold import (
    ThresholdSample,
    ThresholdTable,
)
from dilated_attention_pytorch.selection.top_k import choose_top_k


class BlockSparseAdaptive(BlockSparseLayer):
    """Block-sparse attention whose pattern is chosen from the content.

    Blocks of queries and keys are summarised, a small scorer rates the pairs, every row keeps its
    best blocks within its budget, and attention is computed over those alone. The scorer learns
    from the attention itself (``AdaptiveConfig.estimator``), together with the model.

    Causality: with ``query_scope="block"`` the *choice* for a query block sees all tokens of that
    block, later ones too; with ``"past"`` nothing later than its first token, and not the length
    either. Values are causal per token in both.

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
    thresholds: Tensor

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
        self.scorer: ImportanceScorer | PrototypeScorer
        if config.scorer == "prototypes":
            self.scorer = PrototypeScorer(
                num_heads, head_dim, kv_heads, num_prototypes=config.num_prototypes, scale=scale,
                heads_per_pattern=num_heads // pattern_heads,
            )  # fmt: skip
        else:
            self.scorer = self._new_scorer()
        if config.hierarchy and self.segment_lengths is not None:
            raise ValueError(
                "hierarchy chooses among all blocks and segment_lengths limits them; give one."
            )
        self.coarse_scorers = nn.ModuleList(self._new_scorer() for _ in config.hierarchy)
        if "attention" in config.pooling and config.scorer != "prototypes":
            self.query_pool = nn.Parameter(torch.randn(num_heads, head_dim) * head_dim**-0.5)
            self.key_pool = nn.Parameter(torch.randn(self.num_kv_heads, head_dim) * head_dim**-0.5)
        if config.sample_stride is not None:
            self.sample_gain = nn.Parameter(torch.zeros(pattern_heads))
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
            # Rows of (tokens, threshold), ascending in the tokens.
            self.register_buffer("thresholds", torch.zeros(0, 2, dtype=torch.float64))
        self._note_densest(1 - config.base_sparsity)
        self._table: ThresholdTable | None = None
        self._record = DensityRecord()

    def _new_scorer(self) -> ImportanceScorer:
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
        self.densest = share
        # torch.compile specialises on integers that it reads of a module, so that one is needed
        # that seldom moves; a float that moves would become a symbol, and sizes with it.
        self.halvings = halvings(share)
        self.keeps_all = share == 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseAdaptive:
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
        levels: list[ChosenLevel] = []
        if config.hierarchy:
            queries, keys, key_means = self.summaries(inputs)
            intervals = inputs.rule.intervals(inputs.rows)
            found, levels = narrow(
                self, inputs, intervals, queries, keys, explore=explore, kernels=False
            )
            inputs = inputs.limited_to(found)
            scores = self.scorer(queries, keys, inputs.candidates.indices)
        else:
            scores, key_means = self.score(inputs)
        candidates = inputs.candidates
        budget = row_budgets(self, inputs, scores, key_means)
        forced = candidates.forced.sum(-1, dtype=torch.int32)
        count = (budget - forced).clamp(min=0)
        bound = scored_bound(self, inputs, count)
        ranked = scores.detach()
        if explore:
            noise = gumbel_noise(scores, inputs.generator)
            ranked = ranked + noise * self.effective_temperature().detach()
        chosen = choose_top_k(ranked, candidates.scored, count, bound)
        if explore and config.estimator == "soft":
            return soft_selection(self, inputs, scores, noise, count, bound)
        if explore and config.num_explore_blocks:
            chosen = chosen | explore_blocks(self, inputs, chosen)
        return hard_selection(self, inputs, scores, chosen, bound, levels)

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
        if config.budget in ("top_p", "threshold"):
            return f"budget {config.budget!r} normalises the scores of a row"
        if config.query_scope == "past" and inputs.mask.causal:
            return "query_scope 'past' takes running budgets"
        if config.scorer == "prototypes":
            return "scorer 'prototypes' reads tokens, not summaries"
        if config.sample_stride is not None:
            return "sample_stride samples the logits"
        width = inputs.rule.width(inputs.rows)
        return kernel_refusal(query.device, query.dtype, self.block_size, self.head_dim, width)

    def score(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor]:
        """Scores of all candidates ``(b, h, i, c)``, and the key blocks' means."""
        scores, means = self._learned_scores(inputs)
        if self.config.sample_stride is None:
            return scores, means
        sampled = antidiagonal_scores(
            inputs.query.detach(), inputs.key.detach(), inputs.mask,
            block_size=self.block_size, stride=self.config.sample_stride,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            query_valid=inputs.query_valid, key_valid=inputs.key_valid,
        )  # fmt: skip
        if sampled.shape[1] != self.pattern_heads:
            sampled = sampled.unflatten(1, (self.pattern_heads, -1)).mean(2)
        indices = inputs.candidates.indices
        if indices is not None:
            index = indices.clamp(0, sampled.shape[-1] - 1).expand(*sampled.shape[:3], -1)
            sampled = sampled.gather(-1, index)
        return scores + self.sample_gain[:, None, None] * sampled, means

    def _learned_scores(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor]:
        if isinstance(self.scorer, PrototypeScorer):
            query, valid = self._scope(inputs)
            scores = self.scorer(
                query, inputs.key, self.block_size, inputs.candidates.indices,
                query_valid=valid, key_valid=inputs.key_valid,
            )  # fmt: skip
            return scores, self._key_means(inputs)
        queries, keys, means = self.summaries(inputs)
        return self.scorer(queries, keys, inputs.candidates.indices), means

    def summaries(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Summaries of query and key blocks, and the key blocks' means."""
        queries = self.pool_queries(*self._scope(inputs))
        return (queries, *self.pool_keys(inputs.key, inputs.key_valid))

    def _scope(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor | None]:
        """The query tokens that each row may be judged by, and which of them are real."""
        query, valid = inputs.query, inputs.query_valid
        if self.config.query_scope == "past" and inputs.mask.causal:
            return past_windows(query, self.block_size, valid, inputs.mask.document_ids)
        return query, valid

    def _key_means(self, inputs: SelectionInputs) -> Tensor:
        return block_summaries(
            inputs.key.detach(), self.block_size, pooling=("mean",), valid=inputs.key_valid
        )

    def threshold_sample(self, inputs: SelectionInputs) -> ThresholdSample:
        """What a calibration of ``budget="threshold"`` needs of these inputs."""
        candidates = inputs.candidates
        return ThresholdSample.of(
            self.score(inputs)[0], candidates.scored, candidates.forced, inputs.rows.num_allowed
        )

    def set_thresholds(self, table: ThresholdTable) -> None:
        """Sets the thresholds of ``budget="threshold"``; they are saved with the weights.

        Raises:
            ValueError: If the budget is another one.
        """
        if self.config.budget != "threshold":
            raise ValueError(f"thresholds need budget='threshold', got {self.config.budget!r}.")
        rows = list(zip(table.lengths, table.thresholds, strict=True))
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
            lengths, values = self.thresholds.T.tolist()
            self._table = ThresholdTable(tuple(map(int, lengths)), tuple(values))
        return self._table

    def pool_queries(self, query: Tensor, valid: Tensor | None) -> Tensor:
        """Summaries ``(b, i, num_heads, s)`` of blocks of queries ``(b, n, num_heads, d)``."""
        pool = self.query_pool if "attention" in self.config.pooling else None
        return block_summaries(
            query, self.block_size, pooling=self.config.pooling, valid=valid, pool_query=pool
        )

    def pool_keys(self, key: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Summaries ``(b, j, g, s)`` of blocks of keys ``(b, m, g, d)``, and their means."""
        pooling = self.config.pooling
        keys = block_summaries(
            key, self.block_size, pooling=pooling, valid=valid,
            pool_query=self.key_pool if "attention" in pooling else None,
        )  # fmt: skip
        if "mean" in pooling:
            start = pooling.index("mean") * self.head_dim
            return keys, keys[..., start : start + self.head_dim]
        detached = key.detach()
        return keys, block_summaries(detached, self.block_size, pooling=("mean",), valid=valid)

    def record_density(self, exact: Tensor, rows: Any, rounded: Tensor | None) -> None:
        """Notes the budgets; their sums are left to get_sparsity_loss, not of every step."""
        self._record = DensityRecord(exact, rows.num_allowed, rounded, 1 - self.base_sparsity)

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
    def prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: SelectorState,
        *,
        key_lengths: Tensor | None = None,
        starts: Tensor | None = None,
        selector_query: Tensor | None = None,
        selector_key: Tensor | None = None,
    ) -> Tensor:
        """The causal forward pass over a prompt; ``state`` remembers what decoding needs.

        Args:
            query: ``(batch, n, num_heads, head_dim)``, padding after the tokens.
            key: ``(batch, n, num_kv_heads, head_dim)``.
            value: Shaped like ``key``.
            state: An empty one; is filled.
            key_lengths: ``(batch,)`` integers: tokens of each sample. None: all n.
            starts: ``(batch,)`` integers: where the cache handed to :meth:`decode` keeps token 0
                of each sample (left padding). None: 0.
            selector_query: As in :meth:`forward`.
            selector_key: As in :meth:`forward`.

        Returns:
            The output, shaped like ``query``.

        Raises:
            RuntimeError: In training mode.
            ValueError: If shapes do not fit, or ``state`` is not empty.
        """
        return decoding.prefill(
            self, query, key, value, state, key_lengths=key_lengths, starts=starts,
            selector_query=selector_query, selector_key=selector_key,
        )  # fmt: skip

    @torch.no_grad()
    def remember(
        self,
        query: Tensor,
        key: Tensor,
        state: SelectorState,
        *,
        key_lengths: Tensor | None = None,
        starts: Tensor | None = None,
        query_offset: Tensor | None = None,
    ) -> None:
        """Fills an empty ``state`` with a prompt whose attention somebody else computed.

        Such as a dense pass over the prompt that sparse decoding follows. Arguments and errors as
        for :meth:`prefill`; ``query`` and ``key`` are what blocks are chosen by.

        Args:
            query: As there, or with ``query_offset`` fewer.
            key: As there.
            state: As there. With ``query_offset`` it may hold tokens: all are taken anew from
                ``key``, and its latest queries stay known if ``query`` follows them.
            key_lengths: As there.
            starts: As there.
            query_offset: ``(batch,)`` integers: the token of the first query, where a cache gives
                the keys of a past whose queries are gone. Until a whole window of queries has
                come, blocks are chosen by those that there are. None: ``query`` is the prompt.
        """
        decoding.remember(
            self, query, key, state, key_lengths=key_lengths, starts=starts,
            query_offset=query_offset,
        )  # fmt: skip

    @torch.no_grad()
    def decode(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        state: SelectorState,
        *,
        selector_query: Tensor | None = None,
        selector_key: Tensor | None = None,
        choose: bool | None = None,
    ) -> Tensor:
        """Attention of the next tokens over the blocks that they choose in a KV cache.

        Work per token grows with the kept blocks and the number of blocks, not with the tokens:
        blocks are scored by summaries that ``state`` keeps, and no key outside the kept blocks is
        read. Nothing waits for a GPU.

        With ``query_scope="past"`` a block of tokens chooses once, at its first token, and the
        outputs are those of the causal forward pass over everything so far, in every layer of a
        model. With ``"block"`` each token chooses anew, by the tokens of its block so far: as the
        last token of a forward pass over everything so far would. There earlier tokens of the
        block choose again with hindsight, so that the second layer of a model no longer sees the
        same inputs; generation is close to uncached generation, not equal to it.

        Args:
            query: ``(batch, n, num_heads, head_dim)``: the tokens that follow those of ``state``;
                any number, made for a few.
            key_cache: ``(batch, capacity, num_kv_heads, head_dim)``: the owner has already written
                the new keys behind the others. It may be another tensor at every call.
            value_cache: Shaped like ``key_cache``.
            state: From :meth:`prefill`, or empty; the new tokens are added.
            selector_query: Shaped like ``query``: as in :meth:`forward`.
            selector_key: ``(batch, n, num_kv_heads, head_dim)``, of the new tokens: as in
                :meth:`forward`. None: read from ``key_cache``.
            choose: None: choose where necessary. True or False: whether this call chooses, for
                ``n = 1``; a CUDA graph records one or the other. False is right as long as no
                sample begins a block, with ``query_scope="past"``.

        Returns:
            The output, shaped like ``query``.

        Raises:
            RuntimeError: In training mode.
            ValueError: If shapes do not fit, or the state is full.
        """
        return decoding.decode(
            self, query, key_cache, value_cache, state, selector_query=selector_query,
            selector_key=selector_key, choose=choose,
        )  # fmt: skip

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
