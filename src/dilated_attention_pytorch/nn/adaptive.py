"""BlockSparseAdaptive: attention that chooses its blocks from the content, and learns to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.config import AdaptiveConfig, as_int
from dilated_attention_pytorch.nn.block_sparse import stand_in
from dilated_attention_pytorch.nn.budgets import threshold_sample
from dilated_attention_pytorch.nn.decode import decode, remember
from dilated_attention_pytorch.nn.held_budget import PEAKED, peak_of
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs
from dilated_attention_pytorch.nn.scorings import scoring_of
from dilated_attention_pytorch.nn.select import select
from dilated_attention_pytorch.nn.selector import SelectorLayer
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.runtime import tracing
from dilated_attention_pytorch.selection.budget import nothing_to_choose
from dilated_attention_pytorch.selection.threshold import ThresholdSample


class NothingToChooseWarning(UserWarning):
    """A layer trains where the blocks that are always read use up its budget.

    Example:
        >>> import warnings
        >>> import torch
        >>> from dilated_attention_pytorch import BlockSparseAdaptive
        >>> warnings.simplefilter("ignore", NothingToChooseWarning)  # where it is meant to be so
        >>> x = torch.randn(1, 256, 2, 16)
        >>> BlockSparseAdaptive(num_heads=2, head_dim=16)(x, x, x, is_causal=True).shape
        torch.Size([1, 256, 2, 16])
    """


class BlockSparseAdaptive(SelectorLayer):
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
            scoring_of(config.scorer),
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            scale=scale,
            backend=backend,
        )

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
        _warn_if_nothing_is_left(self, inputs)
        apart = self.training and self.keeps_all
        if apart:
            # Until attention has found where to look, what the selector asks of queries and keys
            # would keep it from that (docs/log.md, "Where learning starts").
            inputs = inputs.asking_if(peak_of(self.budget_state) >= PEAKED)
        found = select(self, inputs)
        return replace(found, query=None, key=None) if apart else found

    def threshold_sample(self, inputs: SelectionInputs) -> ThresholdSample:
        """What a calibration of ``budget="threshold"`` needs of these inputs."""
        kernels = self.unsupported_reason(inputs) is None

        def sample(*_: Tensor) -> ThresholdSample:
            return threshold_sample(self, self.scoring.score(self, inputs, kernels=kernels))

        return self.called(sample, inputs.query, inputs.key, inputs.key)

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
            selector_query: Shaped like ``query``: what blocks are chosen by in place of it. None:
                ``query``.
            selector_key: The same for ``key``.

        Returns:
            The output, shaped like ``query``.

        Raises:
            RuntimeError: In training mode.
            ValueError: If shapes do not fit, or ``state`` is not empty.
        """

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.check_inputs(query, key, value)
            remember(
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

        Such as a dense pass over the prompt that sparse decoding follows.

        Args:
            query: ``(batch, n, num_heads, head_dim)``: what blocks are chosen by, padding after
                the tokens; with ``query_offset`` fewer than the keys.
            key: ``(batch, n, num_kv_heads, head_dim)``, of the whole prompt.
            state: An empty one; is filled. With ``query_offset`` it may hold tokens: all are taken
                anew from ``key``, and its latest queries stay known if ``query`` follows them.
            key_lengths: ``(batch,)`` integers: tokens of each sample. None: all n.
            starts: ``(batch,)`` integers: where the cache handed to :meth:`decode` keeps token 0
                of each sample (left padding). None: 0.
            query_offset: ``(batch,)`` integers: the token of the first query, where a cache gives
                the keys of a past whose queries are gone. Until a whole window of queries has
                come, blocks are chosen by those that there are. None: ``query`` is the prompt.

        Raises:
            RuntimeError: In training mode.
            ValueError: If shapes do not fit, or ``state`` is not empty.
        """

        def run(query: Tensor, key: Tensor, _: Tensor) -> Tensor:
            remember(
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
            selector_query: Shaped like ``query``: what blocks are chosen by in place of it. None:
                ``query``.
            selector_key: ``(batch, n, num_kv_heads, head_dim)``, the same of the new tokens' keys.
                None: read from ``key_cache``, as ``scorer="low_rank"`` must.
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
            lambda query, key, value: decode(
                self, query, key, value, state, selector_query=selector_query,
                selector_key=selector_key, choose=choose,
            ),
            query, key_cache, value_cache,
        )  # fmt: skip


def create_adaptive_block_sparse(
    embed_dim: int,
    num_heads: int,
    segment_lengths: Sequence[int] | None = (2048, 4096, 8192),
    dilation_rates: Sequence[int] | None = (1, 2, 4),
    adaptive_config: AdaptiveConfig | None = None,
    *,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> BlockSparseAdaptive:
    """Builds a :class:`BlockSparseAdaptive` for a model dimension.

    Args:
        embed_dim: Model dimension; ``head_dim = embed_dim // num_heads``.
        num_heads: Query heads; must divide ``embed_dim``.
        segment_lengths: Tokens per segment of each dilation group; blocks outside a common segment
            cannot be chosen. None: choose from all blocks.
        dilation_rates: Rate of each group; None without segments.
        adaptive_config: Settings; None: ``AdaptiveConfig()``.
        num_kv_heads: Key and value heads; None: ``num_heads``.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        backend: Of :func:`block_sparse_attention`.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dim``.

    Example:
        >>> layer = create_adaptive_block_sparse(embed_dim=768, num_heads=12)
        >>> layer.head_dim
        64
    """
    embed_dim, num_heads = as_int("embed_dim", embed_dim), as_int("num_heads", num_heads)
    if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"num_heads must divide embed_dim, got num_heads={num_heads}, embed_dim={embed_dim}."
        )
    return BlockSparseAdaptive(
        segment_lengths,
        dilation_rates,
        num_heads,
        embed_dim // num_heads,
        adaptive_config,
        num_kv_heads=num_kv_heads,
        scale=scale,
        backend=backend,
    )


def _warn_if_nothing_is_left(layer: SelectorLayer, inputs: SelectionInputs) -> None:
    """Warns of a training pass in which no row can choose, once per layer."""
    config, mask = layer.config, inputs.mask
    if layer.told_of_nothing or not layer.training or tracing() or layer.keeps_all:
        return
    whole = mask.q_len == mask.kv_len and not mask.per_sample and layer.segment_lengths is None
    if not (layer.budget.by_share and whole and inputs.rows.has_diagonal and mask.q_len):
        return
    words = nothing_to_choose(config, 1 - layer.densest, mask.kv_len, causal=mask.causal)
    if words:
        layer.told_of_nothing = True
        warnings.warn(words, NothingToChooseWarning, stacklevel=2)
