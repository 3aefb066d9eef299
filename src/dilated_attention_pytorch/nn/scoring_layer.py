"""How an adaptive layer rates pairs of blocks: summaries and scorers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.block_sparse import SelectionInputs
from dilated_attention_pytorch.nn.budget_layer import BudgetLayer
from dilated_attention_pytorch.nn.own_blocks import OwnBlocks
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer
from dilated_attention_pytorch.scoring.summaries import block_summaries, exact_dtype, past_windows


class ScoringLayer(BudgetLayer):
    """A block-sparse layer with a scorer; :class:`BlockSparseAdaptive` says what of.

    Args:
        config: Settings.
        segment_lengths: As there.
        dilation_rates: As there.
        num_heads: As there.
        head_dim: As there.
        num_kv_heads: As there.
        scale: As there.
        backend: As there.

    Raises:
        ValueError: If sizes are not positive or do not fit.
    """

    def __init__(
        self,
        config: AdaptiveConfig,
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
        self.config = config
        self.scorer: ImportanceScorer | LowRankScorer
        if config.scorer == "low_rank":
            self.scorer = LowRankScorer(
                num_heads, head_dim, kv_heads, rank=min(config.hidden_dim, head_dim), scale=scale,
                query_stride=config.query_stride, heads_per_pattern=num_heads // pattern_heads,
            )  # fmt: skip
        else:
            self.scorer = self._new_scorer()
        if config.hierarchy and self.segment_lengths is not None:
            raise ValueError(
                "hierarchy chooses among all blocks and segment_lengths limits them; give one."
            )
        self.coarse_scorers = nn.ModuleList(self._new_scorer() for _ in config.hierarchy)
        if "attention" in config.pooling and config.scorer in ("bilinear", "mlp"):
            self.query_pool = nn.Parameter(torch.randn(num_heads, head_dim) * head_dim**-0.5)
            self.key_pool = nn.Parameter(torch.randn(self.num_kv_heads, head_dim) * head_dim**-0.5)

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

    def exactly(self, device: torch.device) -> AbstractContextManager[Any]:
        """Summaries are scored in float32 under autocast too, as by the fused kernels."""
        if device.type == "meta" or not isinstance(self.scorer, ImportanceScorer):
            return nullcontext()
        return torch.autocast(device.type, enabled=False)

    def score(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor]:
        """Scores of all candidates ``(b, h, i, c)``, and the key blocks' means."""
        return self.called(lambda *_: self.scores_of(inputs), inputs.query, inputs.key, inputs.key)

    def scores_of(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor]:
        """:meth:`score`, inside a call of the layer."""
        if isinstance(self.scorer, LowRankScorer):
            scores = self.scorer(
                inputs.query, inputs.key, inputs.mask, self.block_size, inputs.candidates.indices,
                query_valid=inputs.query_valid, past=self.looks_back(inputs.mask),
            )  # fmt: skip
            return scores, self.key_means(inputs.key, inputs.key_valid)
        queries, keys, means = self.summaries(inputs)
        numbers = inputs.candidates.indices
        scores = self.scorer(queries, keys, numbers)
        if self.weighs_own_block(inputs.mask):
            own = OwnBlocks.of(inputs, self.block_size)
            summary, _ = self.pool_keys(own.key, own.valid)
            scores = own.place(scores, self.scorer(queries, summary, own.rows), numbers)
        return scores, means

    def weighs_own_block(self, mask: AttentionMask) -> bool:
        """Whether the score of a row's own block counts, and may know its first token alone.

        Thresholds are compared with shares of all that a row sees.
        """
        return self.config.budget == "threshold" and self.looks_back(mask)

    def summaries(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Summaries of query and key blocks, and the key blocks' means."""
        queries = self.pool_queries(*self.scope(inputs))
        return (queries, *self.pool_keys(inputs.key, inputs.key_valid))

    def looks_back(self, mask: AttentionMask) -> bool:
        """Whether rows are judged by queries up to their first token alone."""
        return self.config.query_scope == "past" and mask.causal

    def scope(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor | None]:
        """The query tokens that each row may be judged by, and which of them are real."""
        query, valid = inputs.query, inputs.query_valid
        if self.looks_back(inputs.mask):
            return past_windows(query, self.block_size, valid, inputs.mask.document_ids)
        return query, valid

    def pool_queries(self, query: Tensor, valid: Tensor | None) -> Tensor:
        """Summaries ``(b, i, num_heads, s)`` of blocks of queries ``(b, n, num_heads, d)``."""
        pool = self.query_pool if "attention" in self.config.pooling else None
        return block_summaries(
            query, self.block_size, pooling=self.config.pooling, valid=valid, pool_query=pool,
            dtype=exact_dtype(query.dtype),
        )  # fmt: skip

    def pool_keys(self, key: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Summaries ``(b, j, g, s)`` of blocks of keys ``(b, m, g, d)``, and their means."""
        pooling = self.config.pooling
        keys = block_summaries(
            key, self.block_size, pooling=pooling, valid=valid,
            pool_query=self.key_pool if "attention" in pooling else None,
            dtype=exact_dtype(key.dtype),
        )  # fmt: skip
        if "mean" in pooling:
            start = pooling.index("mean") * self.head_dim
            return keys, keys[..., start : start + self.head_dim]
        return keys, self.key_means(key, valid)

    def key_means(self, key: Tensor, valid: Tensor | None) -> Tensor:
        """Means ``(b, j, g, d)`` of blocks of keys ``(b, m, g, d)``, for budgets; no gradient."""
        dtype = exact_dtype(key.dtype)
        return block_summaries(
            key.detach(), self.block_size, pooling=("mean",), valid=valid, dtype=dtype
        )
