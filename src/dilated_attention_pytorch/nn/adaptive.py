"""BlockSparseAdaptive: attention that chooses its blocks from the content, and learns to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.nn import decoding
from dilated_attention_pytorch.nn.block_sparse import (
    Selection,
    SelectionInputs,
    stand_in,
)
from dilated_attention_pytorch.nn.estimators import (
    explore_blocks,
    hard_selection,
    soft_selection,
)
from dilated_attention_pytorch.nn.fused_selection import select_with_kernels
from dilated_attention_pytorch.nn.hierarchical_selection import ChosenLevel, narrow
from dilated_attention_pytorch.nn.nothing_left import warn_if_nothing_is_left
from dilated_attention_pytorch.nn.row_budgets import row_budgets, scored_bound
from dilated_attention_pytorch.nn.scheduled_layer import ScheduledLayer
from dilated_attention_pytorch.nn.selector_state import SelectorState
from dilated_attention_pytorch.nn.threshold_selection import place_refusal
from dilated_attention_pytorch.nn.token_selection import score_tokens, select_by_tokens
from dilated_attention_pytorch.ops.block_selection.interface import low_rank_unsupported_reason
from dilated_attention_pytorch.selection.gumbel import gumbel_noise
from dilated_attention_pytorch.selection.threshold import ThresholdSample
from dilated_attention_pytorch.selection.top_k import choose_top_k


class BlockSparseAdaptive(ScheduledLayer):
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
        super().__init__(
            config,
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            scale=scale,
            backend=backend,
        )
        self.told_of_nothing = False
        self.add_settings()

    def extra_repr(self) -> str:
        """Shown by ``print(layer)``."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, segment_lengths={self.segment_lengths}, "
            f"dilation_rates={self.dilation_rates}, estimator={self.config.estimator!r}, "
            f"base_sparsity={self.config.base_sparsity}, block_size={self.block_size}"
        )

    def pattern_info(self, pattern: Any) -> dict[str, Any]:
        """Adds the ``"temperature"`` in force."""
        info = super().pattern_info(pattern)
        info["temperature"] = float(self.effective_temperature().detach())
        return info

    def select(self, inputs: SelectionInputs) -> Selection:
        """Scores, budgets and chooses; see the class."""
        warn_if_nothing_is_left(self, inputs)
        apart = self.training and self.keeps_all
        if apart:
            # Nothing is chosen yet, and what the selector asks of queries and keys would keep
            # attention from finding where to look (docs/log.md, "Where learning starts").
            inputs = inputs.without_gradient()
        with self.exactly(inputs.query.device):
            if self.selection_refusal(inputs) is not None:
                found = self._select_with_pytorch(inputs)
            elif self.config.scorer == "low_rank":
                found = select_by_tokens(self, inputs)
            else:
                found = select_with_kernels(self, inputs)
        return replace(found, query=None, key=None) if apart else found

    def _select_with_pytorch(self, inputs: SelectionInputs) -> Selection:
        config = self.config
        explore = self.explores
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
            scores, key_means = self.scores_of(inputs)
        candidates = inputs.candidates
        budgets = row_budgets(self, inputs, scores, key_means)
        forced = candidates.forced.sum(-1, dtype=torch.int32)
        count = (budgets.whole - forced).clamp(min=0)
        bound = scored_bound(self, inputs, count)
        ranked = scores.detach()
        if explore:
            noise = gumbel_noise(scores, inputs.generator)
            ranked = ranked + noise * self.effective_temperature().detach()
        chosen = choose_top_k(ranked, candidates.scored, count, bound)
        if explore and config.estimator == "soft":
            selection = soft_selection(self, inputs, scores, noise, count, bound)
        else:
            if explore and config.num_explore_blocks:
                chosen = chosen | explore_blocks(self, inputs, chosen)
            evidence = budgets.evidence(self, forced)
            selection = hard_selection(self, inputs, scores, chosen, bound, levels, evidence)
        budgets.hand_on()
        return selection

    def selection_refusal(self, inputs: SelectionInputs) -> str | None:
        """Why this selection takes the PyTorch path, or None if the fused kernels run it."""
        config = self.config
        place = place_refusal(self, inputs)
        if place is not None:
            return place
        if config.estimator != "mass":
            return f"estimator {config.estimator!r} needs the gradient of all candidates' scores"
        if config.scorer == "mlp":
            return "scorer 'mlp' has no kernel"
        if config.scorer != "low_rank":
            if config.budget == "threshold":
                return f"budget 'threshold' has no kernel for scorer {config.scorer!r}"
            return None
        if self.training:
            return f"scorer {config.scorer!r} learns from the scores of all candidates"
        if self.segment_lengths is not None:
            return f"scorer {config.scorer!r} scores all blocks, and segments limit them"
        return low_rank_unsupported_reason(inputs.query.dtype, self.block_size, self.head_dim)

    def threshold_sample(self, inputs: SelectionInputs) -> ThresholdSample:
        """What a calibration of ``budget="threshold"`` needs of these inputs."""
        if self.selection_refusal(inputs) is not None:
            return super().threshold_sample(inputs)
        return self.called(
            lambda *_: self._sample(inputs, score_tokens(self, inputs)),
            inputs.query, inputs.key, inputs.key,
        )  # fmt: skip

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

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.check_inputs(query, key, value)
            decoding.remember(
                self,
                stand_in("selector_query", selector_query, query),
                stand_in("selector_key", selector_key, key),
                state, key_lengths=key_lengths, starts=starts, query_offset=None,
            )  # fmt: skip
            # Inside of a call: without hooks, which run around all of it.
            out: Tensor = self.forward(
                query, key, value, is_causal=True, key_lengths=key_lengths,
                selector_query=selector_query, selector_key=selector_key,
            )  # fmt: skip
            return out

        return self.called(run, query, key, value)

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

        def run(query: Tensor, key: Tensor, _: Tensor) -> Tensor:
            decoding.remember(
                self, query, key, state, key_lengths=key_lengths, starts=starts,
                query_offset=query_offset,
            )  # fmt: skip
            # Hooks that look at what a call returns find a tensor.
            return query

        self.called(run, query, key, key)

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
        read. Nothing waits for a GPU. With ``scorer="low_rank"`` a choice reads all cached keys:
        with ``query_scope="past"`` once per block of tokens, with ``"block"`` once every
        ``query_stride`` tokens, and at every token where samples differ in length.

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
                :meth:`forward`. None: read from ``key_cache``, as ``scorer="low_rank"`` must.
            choose: None: choose where necessary. True or False: whether this call chooses, for
                ``n = 1``; a CUDA graph records one or the other. False is right as long as no
                sample begins a block, with ``query_scope="past"``; with ``"block"`` and
                ``scorer="low_rank"`` between two sampled queries, and True goes on from the choices
                before it: after a crop choose once with None.

        Returns:
            The output, shaped like ``query``.

        Raises:
            RuntimeError: In training mode.
            ValueError: If shapes do not fit, or the state is full.
        """
        return self.called(
            lambda query, key, value: decoding.decode(
                self, query, key, value, state, selector_query=selector_query,
                selector_key=selector_key, choose=choose,
            ),
            query, key_cache, value_cache,
        )  # fmt: skip
