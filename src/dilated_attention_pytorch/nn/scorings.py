"""The two kinds of scoring: by summaries of blocks, and by projected tokens.

``scoring_of`` is the one place that reads ``AdaptiveConfig.scorer``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.candidates import Candidates, count_forced
from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.nn.budget_layer import Scored, key_means
from dilated_attention_pytorch.nn.budgets import newest_floor, newest_thresholds, room, rule_of
from dilated_attention_pytorch.nn.hierarchy import narrow_down
from dilated_attention_pytorch.nn.inputs import OwnBlocks, SelectionInputs, bound_of
from dilated_attention_pytorch.nn.selector import CachedKeys, Scoring, SelectorLayer
from dilated_attention_pytorch.nn.state import Memory, NewestRow
from dilated_attention_pytorch.ops.block_selection.interface import (
    best_blocks,
    compiled_unsupported_reason,
    find_candidates,
    list_newest,
    low_rank_scores,
    low_rank_unsupported_reason,
    summarise_and_pass,
)
from dilated_attention_pytorch.ops.block_selection.interface import (
    kernel_unsupported_reason as kernel_unsupported_reason,
)
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer, take_columns
from dilated_attention_pytorch.scoring.summaries import exact_dtype
from dilated_attention_pytorch.selection.budget import most_visible_share
from dilated_attention_pytorch.selection.hierarchical import ChosenLevel
from dilated_attention_pytorch.selection.threshold import peak_budget
from dilated_attention_pytorch.selection.top_k import choose_top_k


class SummaryScoring(Scoring):
    """A network compares summaries of query and key blocks: ``scorer="bilinear"``, ``"mlp"``."""

    by_summaries = True

    def make(self, layer: SelectorLayer) -> ImportanceScorer:
        """A network."""
        return layer.new_network()

    def score(
        self, layer: SelectorLayer, inputs: SelectionInputs, *, kernels: bool, narrow: bool = False
    ) -> Scored:
        """Summaries, and the network's scores of their pairs."""
        narrow = narrow and bool(layer.config.hierarchy)
        if kernels:
            return self._score_with_kernels(layer, inputs, narrow)
        queries = layer.pool_queries(*layer.scope(inputs))
        keys = layer.pool_keys(inputs.key, inputs.key_valid)
        levels: list[ChosenLevel] = []
        if narrow:
            found, levels = narrow_down(layer, inputs, queries, keys, kernels=False)
            inputs = inputs.limited_to(found)
        numbers = inputs.candidates.indices
        scores = _network(layer)(queries, keys, numbers)
        if layer.budget.calibrated and layer.looks_back(inputs.mask) and not narrow:
            # Thresholds are compared with shares of all that a row sees, so that the score of its
            # own block counts, and may know its first token alone.
            own = OwnBlocks.of(inputs, layer.block_size)
            summary = layer.pool_keys(own.key, own.valid)
            scores = own.place(scores, _network(layer)(queries, summary, own.rows), numbers)
        scored = Scored.of(inputs, scores)
        # Budgets depend on lengths alone, not on which super-blocks were kept.
        limit = inputs.rows.num_allowed.long() if narrow else scored.limit
        return replace(scored, limit=limit, keys=keys, mean_at=layer.mean_at, levels=levels)

    def _score_with_kernels(
        self, layer: SelectorLayer, inputs: SelectionInputs, narrow: bool
    ) -> Scored:
        """The same from the same scores; nothing waits for the device.

        Scores of all candidates carry no gradient; those of the kept tiles do, which is all that
        the tile mass teaches.
        """
        numbers, forced, limit = find_candidates(inputs.rule, inputs.rows, inputs.intervals)
        levels: list[ChosenLevel] = []
        with torch.set_grad_enabled(layer.teaches):
            queries, keys, *passed = self.summarise(layer, inputs)
            if narrow:
                numbers, levels = narrow_down(layer, inputs, queries, keys, kernels=True)
            towers, scores = self.products(layer, queries, keys, numbers)
        return Scored(
            inputs, scores, forced, limit, True, numbers, keys, layer.mean_at, levels, towers,
            (passed[0], passed[1]),
        )  # fmt: skip

    def summarise(
        self, layer: SelectorLayer, inputs: SelectionInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Summaries of query and key blocks with kernels, queries and keys."""
        pooling = layer.config.pooling
        pools = (layer.query_pool, layer.key_pool) if "attention" in pooling else None
        past = layer.looks_back(inputs.mask)
        # Rows see from the first block of their document on.
        starts = inputs.intervals[:, 0] if past and inputs.mask.document_ids is not None else None
        return summarise_and_pass(
            inputs.query, inputs.key, layer.block_size, pooling,
            (inputs.query_valid, inputs.key_valid), pools, past=past, starts=starts,
        )  # fmt: skip

    def products(
        self, layer: SelectorLayer, queries: Tensor, keys: Tensor, numbers: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Encoded queries and keys, and the scores of all candidates."""
        from dilated_attention_pytorch.ops.block_selection.scores import (
            bilinear_op,
            products_op,
            towers_op,
        )

        scorer = _network(layer)

        def encode(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
            share = scorer.heads_per_pattern
            factor = 1 / (math.sqrt(scorer.query_in.shape[-1]) * share)
            encoded: tuple[Tensor, Tensor] = towers_op(
                queries.transpose(1, 2), keys.transpose(1, 2), scorer.query_in, scorer.key_in,
                scorer.gain, factor, share,
            )  # fmt: skip
            return encoded

        if not torch.is_grad_enabled() and not len(scorer.query_tower):
            q, k = scorer.called(encode, queries, keys)
        else:
            q, k = (x.float() for x in scorer.encode(queries, keys))
        with torch.no_grad():
            if numbers is None:
                return (q, k), products_op(q.detach(), k.detach())
            return (q, k), bilinear_op(q.detach(), k.detach(), numbers)

    def unsupported_reason(self, layer: SelectorLayer, inputs: SelectionInputs) -> str | None:
        """The MLP has none; nor have thresholds on scores of summaries."""
        kind = layer.config.scorer
        if kind != "bilinear":
            return f"scorer {kind!r} has no kernel"
        if layer.budget.calibrated:
            return f"budget 'threshold' has no kernel for scorer {kind!r}"
        return None

    def encode(
        self, layer: SelectorLayer, key: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encoded summaries."""
        with layer.exactly(key.device):
            keys, at = layer.pool_keys(key, valid), layer.mean_at
            if at is None:
                means = key_means(key, valid, layer.block_size)
            else:
                means = keys[..., at : at + layer.head_dim]
            return _network(layer).encode_keys(keys), means

    def newest(
        self,
        layer: SelectorLayer,
        memory: Memory,
        row: NewestRow,
        numbers: Tensor | None,
        cached: CachedKeys | None,
        blocks: int,
    ) -> list[Tensor]:
        """The summary of the row's queries against those that were kept."""
        size, first = layer.block_size, row.first
        start = first - (size - 1) if layer.past else first
        # Where the queries up to the row's first token are gone, those that follow stand in.
        start = torch.where(memory.known > first, memory.known, start)
        query, real, _ = memory.window("queries", start, size)
        if layer.past:
            real = real & row.asks(start, size, memory.known)
        with layer.exactly(query.device):
            asked = _network(layer).encode_queries(layer.pool_queries(query, real))
            encoded = memory.encoded_keys[:, :, 1 : blocks + 1]
            return [_network(layer).compare(asked, encoded, numbers)]


class TokenScoring(Scoring):
    """Projected tokens say where attention goes: ``scorer="low_rank"``."""

    by_summaries = False

    def make(self, layer: SelectorLayer) -> LowRankScorer:
        """Maps of queries and keys."""
        config = layer.config
        # Nothing of a choice but the threshold changes between two sampled queries.
        layer.length_step = config.query_stride
        return LowRankScorer(
            layer.num_heads, layer.head_dim, layer.num_kv_heads,
            rank=min(config.hidden_dim, layer.head_dim), scale=layer.scale,
            query_stride=config.query_stride,
            heads_per_pattern=layer.num_heads // layer.pattern_heads,
        )  # fmt: skip

    def score(
        self, layer: SelectorLayer, inputs: SelectionInputs, *, kernels: bool, narrow: bool = False
    ) -> Scored:
        """The expected mass of every tile; with the kernels without gradient."""
        if kernels:
            with torch.no_grad():
                scores, *peaks = self._rate(layer, inputs)
                kept = kept_by_peak_with_kernels(layer, peaks, inputs.intervals)
                return replace(Scored.of(inputs, scores, kernels=True), kept=kept)
        indices = inputs.candidates.indices
        # Of one sample: how it is scored does not hang on how many there are.
        logits = inputs.query.shape[1] * layer.num_heads * inputs.key.shape[1]
        if compiled_unsupported_reason(inputs.query, layer.backend, logits) is None:
            maps = self._rate(layer, inputs, compiled=True)
            scores, *peaks = maps if indices is None else [take_columns(x, indices) for x in maps]
        else:
            found = _low_rank(layer)(
                inputs.query, inputs.key, inputs.mask, layer.block_size, indices,
                query_valid=inputs.query_valid, past=layer.looks_back(inputs.mask),
                peaks=layer.config.peak_share > 0,
            )  # fmt: skip
            scores, *peaks = found if layer.config.peak_share else (found,)
        kept = kept_by_peak(layer, peaks, inputs.candidates, inputs.rows.num_allowed)
        return replace(Scored.of(inputs, scores), kept=kept)

    def _rate(
        self, layer: SelectorLayer, inputs: SelectionInputs, *, compiled: bool = False
    ) -> list[Tensor]:
        """Scores and peaks of all tiles, ``(b, pattern heads, i, j)`` float32, with a kernel."""
        scorer, size = _low_rank(layer), layer.block_size
        stride, query, lead = scorer.query_stride, inputs.query, 0
        if layer.looks_back(inputs.mask):
            # Every block's samples are then those up to its first token.
            lead = size - stride
            query = F.pad(query, (0, 0, 0, 0, lead, -query.shape[1] % size - lead))
        spans = inputs.rows.remember(
            ("spans", size, stride, lead), lambda: _sample_spans(inputs, size, stride, lead)
        )
        return _rate_by_kernel(layer, query, inputs.key, spans, stride, inputs.mask, compiled)

    def unsupported_reason(self, layer: SelectorLayer, inputs: SelectionInputs) -> str | None:
        """Training, segments, and tiles of keys that do not fit."""
        kind = layer.config.scorer
        if layer.training:
            return f"scorer {kind!r} learns from the scores of all candidates"
        if layer.segment_lengths is not None:
            return f"scorer {kind!r} scores all blocks, and segments limit them"
        return low_rank_unsupported_reason(inputs.query.dtype, layer.block_size, layer.head_dim)

    def encode(
        self, layer: SelectorLayer, key: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Nothing is encoded."""
        means = key_means(key, valid, layer.block_size)
        dtype = exact_dtype(_low_rank(layer).key_map.dtype)
        none = torch.zeros(key.shape[0], 0, means.shape[1], 0, dtype=dtype, device=key.device)
        return none, means

    def newest(
        self,
        layer: SelectorLayer,
        memory: Memory,
        row: NewestRow,
        numbers: Tensor | None,
        cached: CachedKeys | None,
        blocks: int,
    ) -> list[Tensor]:
        """The mass that the row's queries expect in each block, and its peak.

        With ``query_scope="block"`` what they have given so far is kept.
        """
        maps = self._of_all_blocks(layer, memory, row, cast(CachedKeys, cached), blocks)
        if numbers is None:
            return maps
        index = numbers.clamp(0, blocks - 1)
        return [x.gather(-1, index.expand(*x.shape[:3], -1)) for x in maps]

    def _of_all_blocks(
        self,
        layer: SelectorLayer,
        memory: Memory,
        row: NewestRow,
        cached: CachedKeys,
        blocks: int,
    ) -> list[Tensor]:
        stride, size = _low_rank(layer).query_stride, layer.block_size
        per_block, first = size // stride, row.first
        start = first - (size - stride) if layer.past else first
        # Where the queries up to the row's first token are gone, those that follow stand in.
        start = torch.where(memory.known > first, memory.known, start)
        if layer.past:
            asking = row.asks(start, per_block, memory.known, stride)
            return self._rate_newest(layer, memory, start, per_block, cached, blocks, asking)
        count = (memory.lengths - 1 - start).div(stride, rounding_mode="floor") + 1
        newest = start + (count - 1) * stride
        total, highest = (x[:, :, 1 : blocks + 1] for x in (memory.masses, memory.peaks))
        if cached.newest:
            found = self._rate_newest(layer, memory, newest, 1, cached, blocks)
            mass, *peaks = found[0].exp()[:, :, 0], *(x[:, :, 0] for x in found[1:])
            begins, more = (
                x[..., None] for x in (count[:, None] == 1, newest[:, None] > memory.sampled)
            )
            total.copy_(torch.where(begins, mass, torch.where(more, total + mass, total)))
            for peak in peaks:
                highest.copy_(torch.where(begins, peak, torch.maximum(highest, peak)))
        else:
            mean, *peaks = self._rate_newest(layer, memory, start, per_block, cached, blocks)
            total.copy_(mean[:, :, 0].exp() * count.view(-1, 1, 1))
            for peak in peaks:
                highest.copy_(peak[:, :, 0])
        memory.sampled.copy_(newest[:, None].expand_as(memory.sampled))
        mean = (total / count.view(-1, 1, 1)).clamp(min=torch.finfo(total.dtype).tiny)
        return [x[:, :, None] for x in (mean.log(), highest)[: 1 + len(peaks)]]

    def _rate_newest(
        self,
        layer: SelectorLayer,
        memory: Memory,
        start: Tensor,
        count: int,
        cached: CachedKeys,
        blocks: int,
        asking: Tensor | None = None,
    ) -> list[Tensor]:
        """Scores and peaks by the ``count`` sampled queries from token ``start`` on.

        As far as there are any. ``asking``: ``(b, count)`` booleans, which of them count at all.
        """
        scorer, size = _low_rank(layer), layer.block_size
        query, real, token = memory.window("queries", start, count, scorer.query_stride)
        if asking is not None:
            real = real & asking
        last = torch.where(real, token, -1)
        key = cached.blocks(blocks, size)
        if has_token_kernel(layer, key, blocks):
            spans = torch.stack([torch.zeros_like(last), last + 1], 1).int()
            visible = AttentionMask(query.shape[1], key.shape[1])
            maps = _rate_by_kernel(layer, query, key, spans, 1, visible)
        else:
            maps = scorer.rate(query, key, last, size, peaks=layer.config.peak_share > 0)
        # Room of the state that the cache has not, whose blocks nobody sees.
        missing = blocks - maps[0].shape[3]
        return [F.pad(x, (0, missing)) for x in maps] if missing else maps


def scoring_of(scorer: str) -> Scoring:
    """The scoring that settings name."""
    return TokenScoring() if scorer == "low_rank" else SummaryScoring()


def has_token_kernel(layer: SelectorLayer, key: Tensor, blocks: int) -> bool:
    """Whether the kernels of a forward pass rate the newest row, too."""
    if layer.backend_unsupported_reason(key.device) is not None:
        return False
    size, dim = layer.block_size, layer.head_dim
    reason = kernel_unsupported_reason(key.device, key.dtype, size, dim, blocks)
    return reason is None and low_rank_unsupported_reason(key.dtype, size, dim) is None


def kept_by_peak(
    layer: SelectorLayer, peaks: Sequence[Tensor], candidates: Candidates, allowed: Tensor
) -> Tensor | None:
    """Candidates that rows keep by their peaks, ``(b, p, i, c)``; None without ``peak_share``.

    Args:
        layer: Whose share.
        peaks: The peaks of the candidates, if there are any.
        candidates: What rows may choose from.
        allowed: Visible blocks per row.
    """
    if not peaks:
        return None
    count = _peak_budget(layer, candidates.forced.sum(-1), allowed).expand(peaks[0].shape[:3])
    most = bound_of(count, candidates.width)
    return choose_top_k(peaks[0], candidates.scored, count, most)


def kept_by_peak_with_kernels(
    layer: SelectorLayer, peaks: Sequence[Tensor], intervals: Tensor
) -> Tensor | None:
    """The same of all key blocks, and the forced ones too.

    Args:
        layer: Whose share.
        peaks: Those of all key blocks, if there are any.
        intervals: What rows see and must read.
    """
    if not peaks:
        return None
    forced, allowed = count_forced(intervals)
    count = (forced + _peak_budget(layer, forced, allowed)).expand(peaks[0].shape[:3])
    most = blocks = peaks[0].shape[-1]
    if not torch.compiler.is_compiling():
        # There a float that moves would become a symbol.
        most = most_visible_share(blocks, layer.densest)
        most += layer.num_sink_blocks + 2 * layer.num_local_blocks + 2
    return best_blocks(peaks[0], intervals, count, min(most, blocks))


def _peak_budget(layer: SelectorLayer, forced: Tensor, allowed: Tensor) -> Tensor:
    share, keep = layer.config.peak_share, 1 - layer.base_sparsity
    return peak_budget(share, keep, forced, allowed, layer.pattern_heads)


def list_newest_row(
    layer: SelectorLayer, memory: Memory, row: NewestRow, cached: CachedKeys, blocks: int
) -> bool:
    """Adds the newest query to what its row has expected, and lists the row's blocks.

    With one kernel, where scores read tokens and thresholds decide. Arguments as of
    ``Scoring.newest``; False: it cannot run this, and nothing was done.
    """
    scorer, size, share = _low_rank(layer), layer.block_size, layer.config.peak_share
    fused = has_token_kernel(layer, cached.key, blocks) and memory.masses.dtype == torch.float32
    if not cached.newest or not (fused or _has_compiled_kernel(layer, memory, cached.key)):
        return False
    threshold = newest_thresholds(layer, memory, row)
    least = newest_floor(layer, row, blocks, blocks)
    quota = newest_quota(layer, row, blocks) if share else None
    scorer.called(
        lambda queries, key: list_newest(
            queries, key, (scorer.query_map, scorer.key_map),
            (memory.lengths, memory.known, cached.starts), threshold, least, quota,
            (memory.masses, memory.peaks, memory.sampled), (memory.counts, memory.indices),
            blocks=blocks, block_size=size, stride=scorer.query_stride, scale=scorer.scale,
            sinks=layer.num_sink_blocks, near=layer.num_local_blocks, compiled=not fused,
        ),
        memory.queries, cached.key, None, size,
    )  # fmt: skip
    return True


def newest_quota(layer: SelectorLayer, row: NewestRow, blocks: int) -> Tensor:
    """What the newest row of each sample keeps by its peaks, int32 ``(1 or b, heads, 1)``."""

    def compute() -> Tensor:
        return _peak_budget(layer, *room(layer, row.rows, blocks)).int()

    share, densest = layer.config.peak_share, layer.densest
    if densest == 1:
        # There the host cannot read the sparsity.
        return compute()
    return row.rows.remember((rule_of(layer, blocks), "newest quota", share, densest), compute)


def _has_compiled_kernel(layer: SelectorLayer, memory: Memory, key: Tensor) -> bool:
    """Whether the compiled kernel of the CPU lists the newest row."""
    if any(x.dtype != torch.float32 for x in (key, memory.queries, memory.masses)):
        return False
    # As attention to new tokens.
    logits = layer.num_heads * key.shape[1] ** 2
    return compiled_unsupported_reason(memory.queries, layer.backend, logits) is None


def _network(layer: SelectorLayer) -> ImportanceScorer:
    return cast(ImportanceScorer, layer.scorer)


def _low_rank(layer: SelectorLayer) -> LowRankScorer:
    return cast(LowRankScorer, layer.scorer)


def _rate_by_kernel(
    layer: SelectorLayer,
    query: Tensor,
    key: Tensor,
    spans: Tensor,
    query_stride: int,
    mask: AttentionMask,
    compiled: bool = False,
) -> list[Tensor]:
    scorer, size = _low_rank(layer), layer.block_size
    return scorer.called(
        lambda query, key: low_rank_scores(
            query, key, scorer.query_map, scorer.key_map, spans, query_stride=query_stride,
            block_size=size, scale=scorer.scale, pattern_heads=layer.pattern_heads,
            peaks=layer.config.peak_share > 0, compiled=compiled,
        ),
        query, key, mask, size,
    )  # fmt: skip


def _sample_spans(inputs: SelectionInputs, block_size: int, stride: int, lead: int) -> Tensor:
    """Keys that every ``stride``-th query sees, ``lead`` tokens before the places of a block.

    What is not there, padding and other documents than the block's see nothing, and so count for
    nothing.
    """
    mask, device = inputs.mask, inputs.query.device
    if lead == 0:
        token = torch.arange(0, mask.q_len, stride, device=device)
        found = mask.spans(token)
        if inputs.query_valid is None:
            return found
        return torch.where(inputs.query_valid[:, None, token], found, 0)
    place = torch.arange(0, ceil_div(mask.q_len, block_size) * block_size, stride, device=device)
    token = place - lead
    real = ((token >= 0) & (token < mask.q_len))[None]
    token = token.clamp(0, mask.q_len - 1)
    if inputs.query_valid is not None:
        real = real & inputs.query_valid[:, token]
    if mask.document_ids is not None:
        ids, first = mask.document_ids, place - place % block_size
        real = real & (ids[:, token] == ids[:, first])
    return torch.where(real[:, None], mask.spans(token), 0)
