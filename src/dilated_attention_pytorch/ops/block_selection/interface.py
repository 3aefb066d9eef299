"""Fused selection: where it runs, and its steps on plain tensors."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import CandidateRule, RowRange, count_forced
from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_sparse_attention.cpp import (
    AUTO_LOGITS,
    build_failure,
    library,
)
from dilated_attention_pytorch.ops.operators import (
    HAS_TRITON,
    NAMESPACE,
    rows_of,
    triton_missing_reason,
)
from dilated_attention_pytorch.pattern import TRANSPOSERS, BlockPattern, PatternTranspose
from dilated_attention_pytorch.selection.budget import FRACTION_BITS, level_tables, round_budget
from dilated_attention_pytorch.selection.top_k import first_of_all

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# One program holds a row of candidates in registers.
_MAX_CANDIDATES = 32768
_MAX_BLOCK = 256
# Numbers in a tile of bfloat16 keys: 64 KiB.
_MOST_TILE = 32768


def kernel_unsupported_reason(
    device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int, candidates: int
) -> str | None:
    """Why the selection kernels cannot run something, or None if they can.

    Args:
        device: Of the tokens.
        dtype: Of the tokens.
        block_size: Tokens per block.
        head_dim: Size of a head.
        candidates: Candidates per row.
    """
    if dtype not in _DTYPES:
        return f"they take bfloat16, float16 and float32, not {dtype}"
    if block_size > _MAX_BLOCK or head_dim > _MAX_BLOCK:
        return f"block size and head_dim must be at most {_MAX_BLOCK}"
    if candidates > _MAX_CANDIDATES:
        return f"a row may have {_MAX_CANDIDATES} candidates, got {candidates}"
    return triton_missing_reason(device)


def summarise(
    x: Tensor,
    block_size: int,
    pooling: tuple[str, ...],
    valid: Tensor | None = None,
    pool_query: Tensor | None = None,
    *,
    past: bool = False,
    starts: Tensor | None = None,
) -> Tensor:
    """:func:`block_summaries` in one read of ``x``, and one write of its gradient.

    Args:
        x: ``(batch, seq_len, num_heads, head_dim)``.
        block_size: Tokens per block.
        pooling: Poolings to concatenate.
        valid: ``(1 or batch, seq_len)`` booleans or None.
        pool_query: ``(num_heads, head_dim)``, with ``"attention"``.
        past: Summarise the windows of :func:`past_windows` in the place of blocks.
        starts: ``(1 or batch, blocks)`` int32, with ``past``: the first block of each block's
            document, whose windows begin no earlier. None: one document.

    Returns:
        ``(batch, blocks, num_heads, head_dim * len(pooling))`` in float32: unlike
        :func:`block_summaries` it does not round to half precision. Of tokens that share an
        extreme the first takes the gradient.
    """
    from dilated_attention_pytorch.ops.block_selection.summaries import summaries_op

    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, pool_query)
    )
    place = wanted and ("max" in pooling or "min" in pooling)
    inputs = _inputs(x, valid, pool_query, pooling)
    out, _ = summaries_op(*inputs, ",".join(pooling), block_size, place, past, starts)
    return out.transpose(1, 2)


def _inputs(
    x: Tensor, valid: Tensor | None, pool_query: Tensor | None, pooling: tuple[str, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As the operators take them."""
    learned = None if "attention" not in pooling or pool_query is None else pool_query.contiguous()
    return rows_of(x), None if valid is None else valid.contiguous(), learned


def summarise_both(
    query: Tensor,
    key: Tensor,
    block_size: int,
    pooling: tuple[str, ...],
    valid: tuple[Tensor | None, Tensor | None],
    pool_queries: tuple[Tensor, Tensor] | None,
    *,
    past: bool = False,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`summarise` of queries and keys; without gradient in one launch where that is possible.

    Args:
        query: ``(batch, seq_len, num_heads, head_dim)``.
        key: The same, of any length and number of heads.
        block_size: Tokens per block.
        pooling: Poolings to concatenate.
        valid: Of the queries and of the keys, ``(1 or batch, seq_len)`` booleans or None.
        pool_queries: ``(num_heads, head_dim)`` of both, with ``"attention"``.
        past: Summarise windows of the past in the place of blocks of queries.
        starts: With ``past``: where each block's document begins, as in :func:`summarise`.
    """
    from dilated_attention_pytorch.ops.block_selection.summaries import both_summaries_op

    pools = (None, None) if pool_queries is None else pool_queries
    alike = (valid[0] is None) == (valid[1] is None) and query.dtype == key.dtype
    if torch.is_grad_enabled() or not alike:
        queries = summarise(
            query, block_size, pooling, valid[0], pools[0], past=past, starts=starts
        )
        return queries, summarise(key, block_size, pooling, valid[1], pools[1])
    of_query = _inputs(query, valid[0], pools[0], pooling)
    of_key = _inputs(key, valid[1], pools[1], pooling)
    pairs = (x for pair in zip(of_query, of_key, strict=True) for x in pair)
    queries, keys = both_summaries_op(*pairs, ",".join(pooling), block_size, past, starts)
    return queries.transpose(1, 2), keys.transpose(1, 2)


def summarise_and_pass(
    query: Tensor,
    key: Tensor,
    block_size: int,
    pooling: tuple[str, ...],
    valid: tuple[Tensor | None, Tensor | None],
    pool_queries: tuple[Tensor, Tensor] | None,
    *,
    past: bool = False,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`summarise_both`, and queries and keys for attention to read in place of the given.

    What attention's gradient adds to them then costs no pass of its own (see ``PassedTokens``).
    Arguments as of :func:`summarise_both`. Tokens without gradient are handed on as they came, and
    so are all under ``torch.compile``.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        found = summarise_both(
            query, key, block_size, pooling, valid, pool_queries, past=past, starts=starts
        )
        return *found, query, key
    from dilated_attention_pytorch.ops.block_selection.summaries import PassedTokens

    results, pools = [], (None, None) if pool_queries is None else pool_queries
    # The past concerns the queries alone.
    for x, counts, pool, windows in (
        (query, valid[0], pools[0], (past, starts)),
        (key, valid[1], pools[1], (False, None)),
    ):
        if x.requires_grad:
            inputs = _inputs(x, counts, pool, pooling)
            out, passed = PassedTokens.apply(*inputs, ",".join(pooling), block_size, *windows)
            results.append((out.transpose(1, 2), passed))
        else:
            out = summarise(
                x, block_size, pooling, counts, pool, past=windows[0], starts=windows[1]
            )
            results.append((out, x))
    (queries, query), (keys, key) = results
    return queries, keys, query, key


def find_candidates(
    rule: CandidateRule, rows: RowRange, intervals: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The candidates' numbers, and forced and all of them per row.

    Args:
        rule: Which blocks there are to choose from.
        rows: Visible ranges.
        intervals: ``rule.intervals(rows)``.

    Returns:
        * Ascending key block numbers ``(1 or b, p, i, c)`` int32, -1 past the last; None: all.
        * Forced blocks per row, int32 ``(1 or b, 1 or p, i)``.
        * Forced and other candidates per row.
    """
    groups = rule.groups()
    if not groups:
        return None, *rows.remember((rule, "counts"), lambda: count_forced(intervals))
    from dilated_attention_pytorch.ops.block_selection.lattice import lattice_op

    segments, rates = zip(*groups, strict=True)
    found: tuple[Tensor, Tensor, Tensor] = lattice_op(
        intervals, rows.diagonal_first[:, 0].contiguous(), list(segments), list(rates),
        rule.num_heads, rule.num_sink_blocks, rule.near_width(rows),
    )  # fmt: skip
    return found


def row_budget(
    rule: CandidateRule,
    rows: RowRange,
    intervals: Tensor,
    forced: Tensor,
    limit: Tensor,
    base_sparsity: Tensor,
    *,
    batch: int,
    means: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    even: Tensor | None = None,
    reach: Tensor | None = None,
    running: bool = False,
) -> tuple[Tensor, Tensor]:
    """Budgets by :func:`share_by_content`, :func:`water_level_budget` and :func:`round_budget`.

    Args:
        rule: Which blocks there are to choose from.
        rows: Visible ranges.
        intervals: ``rule.intervals(rows)``.
        forced: From :func:`find_candidates`: forced blocks per row.
        limit: From there too: forced and other candidates per row.
        base_sparsity: 0-dim float32.
        batch: Samples.
        means: ``(batch, kv heads, j, head_dim)`` means of the key blocks; None: the budget
            ignores content.
        gain: ``(p,)``, with ``means``.
        offset: ``(p,)``, with ``means``.
        even: 0-dim float32: the integer budgets take so much of what lies above the forced
            blocks. None: all of it.
        reach: float32, 0-dim or ``(1 or batch, 1, i)``, for running budgets: rows that see fewer
            blocks count as seeing so many.
        running: :func:`running_budget` in their place, by the complexity of what lies before each
            row; from equal complexities the integers equal PyTorch's.

    Returns:
        Integer budgets ``(batch, p, i)``, forced blocks included, and the exact ones in float32,
        differentiable in gain and offset.
    """
    from dilated_attention_pytorch.ops.block_selection.budgets import (
        budget_op,
        round_op,
        running_budget_op,
    )

    given = (
        None if means is None else means.detach(), gain, offset, base_sparsity, intervals,
        rows.diagonal_first[:, 0].contiguous(), rows.document[:, 0].contiguous(), forced, limit,
    )  # fmt: skip
    sizes = batch, rule.num_heads, rows.has_diagonal
    if running:
        exact, _, _, whole = running_budget_op(*given, even, reach, *sizes, FRACTION_BITS)
        return whole, exact
    width = rule.width(rows)
    tables = rows.remember((rule, "levels"), lambda: level_tables(forced, limit, rows, width))
    exact, _, _ = budget_op(
        *given, tables.filled, tables.rising, tables.visible[:, 0].contiguous(), *sizes
    )
    lowered = exact.detach()
    if even is not None:
        lowered = forced + even * (lowered - forced)
    if rows.num_documents > 1:
        return round_budget(lowered, rows), exact
    return round_op(lowered, FRACTION_BITS), exact


def low_rank_unsupported_reason(dtype: torch.dtype, block_size: int, head_dim: int) -> str | None:
    """Why :func:`low_rank_scores` cannot run what the other kernels can, or None."""
    # A tile of keys stays in shared memory.
    most = _MOST_TILE if dtype == torch.bfloat16 else _MOST_TILE // 2
    # Of the next powers of 2.
    tile = 1 << (block_size - 1).bit_length() + (head_dim - 1).bit_length()
    return f"block size times head_dim may be {most} in {dtype}" if tile > most else None


def low_rank_scores(
    query: Tensor,
    key: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    spans: Tensor,
    *,
    query_stride: int,
    block_size: int,
    scale: float,
    pattern_heads: int,
    peaks: bool = False,
    compiled: bool = False,
) -> list[Tensor]:
    """:class:`LowRankScorer` on all tiles, without the square of the tokens. No gradient.

    Queries go through both maps in float32 and meet the keys as they are; of bfloat16 keys that
    takes queries rounded to bfloat16, which is as much as they lost when they were made.

    Args:
        query: ``(b, n, h, d)``; under autocast of another dtype than ``key``.
        key: ``(b, m, g, d)``.
        query_map: ``(h, d, r)``.
        key_map: The same.
        spans: ``AttentionMask.spans`` of every ``query_stride``-th query.
        query_stride: Take every so many queries.
        block_size: Tokens per block, a multiple of it.
        scale: Factor of the logits.
        pattern_heads: Divides h; the mass of neighbouring heads is averaged.
        peaks: Also what the query that asks most for a block gives it; the most of those heads.
        compiled: By the compiled kernel of the CPU, in float32.

    Returns:
        Logarithms of the expected mass, and with ``peaks`` those, too:
        ``(b, pattern_heads, i, j)`` float32.
    """
    numbers = query_stride, block_size, scale, pattern_heads, peaks
    if compiled:
        return _compiled_scores(query, key, query_map, key_map, spans, *numbers)
    from dilated_attention_pytorch.ops.block_selection.low_rank import low_rank_op

    found = low_rank_op(query, key.to(query.dtype), query_map, key_map, spans, *numbers)
    return list(found[: 1 + peaks])


def compiled_unsupported_reason(like: Tensor, backend: str, logits: int) -> str | None:
    """Why the compiled kernel does not rate something, or None if it does; builds it if need be.

    Args:
        like: Queries.
        backend: Of the layer.
        logits: That dense attention would compute for a sample.
    """
    if like.device.type != "cpu" or like.dtype == torch.float64:
        return f"it computes float32 on the CPU, not {like.dtype} on {like.device.type}"
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "it has no gradient, and a traced program may run where there is no compiler"
    if backend != "cpp" and (backend != "auto" or logits < AUTO_LOGITS):
        return f"with backend='auto' it pays from {AUTO_LOGITS:,} dense logits on"
    return build_failure()


def _compiled_scores(
    query: Tensor, key: Tensor, query_map: Tensor, key_map: Tensor, spans: Tensor,
    query_stride: int, block_size: int, scale: float, pattern_heads: int, peaks: bool,
) -> list[Tensor]:  # fmt: skip
    with torch.autocast("cpu", enabled=False):
        query, key, query_map, key_map = (x.float() for x in (query, key, query_map, key_map))
        query = torch.einsum("bthd,hdr->bhtr", query[:, ::query_stride], query_map)
        groups = query_map.shape[0] // key.shape[2]
        key = torch.einsum("bmhd,hdr->bhmr", key.repeat_interleave(groups, 2), key_map)
        per_block, factor = block_size // query_stride, scale / math.log(2)
        found = masses_op(query * factor, key, spans, per_block, block_size, peaks)
        mass, *highest = found.unflatten(2, (pattern_heads, -1))
        scores = mass.mean(2).clamp(min=torch.finfo(torch.float32).tiny).log()
    return [scores, *(x.amax(2) for x in highest)]


class _Masses(ctypes.Structure):
    """``Masses`` of ``cpp_low_rank.cpp``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "spans", "mass", "peaks")),
        *((name, ctypes.c_int64) for name in (
            "span_step", "batch", "rows", "keys", "heads", "depth", "per_block", "block_size",
            "threads",
        )),
    )  # fmt: skip


@torch.library.custom_op(f"{NAMESPACE}::low_rank_masses", mutates_args=())
def masses_op(
    query: Tensor, key: Tensor, spans: Tensor, per_block: int, block_size: int, peaks: bool
) -> Tensor:
    """Where the softmax of rows goes, the mean over each block of them; no gradient.

    Args:
        query: Rows ``(b, h, t, r)`` float32, times the scale and log2(e).
        key: ``(b, h, m, r)``.
        spans: ``(1 or b, 2, t)`` int32: the first key that each row sees, and one past the last;
            rows that see nothing count for nothing.
        per_block: Rows of a block.
        block_size: Keys of a block.
        peaks: Also the most that a row of a block gives.

    Returns:
        ``(1, b, h, i, j)``, with ``peaks`` ``(2, b, h, i, j)``.
    """
    query, key, spans = query.contiguous(), key.contiguous(), spans.contiguous()
    out = _empty_masses(query, key, spans, per_block, block_size, peaks).zero_()
    if out.numel() == 0:
        return out
    problem = _Masses(
        query.data_ptr(), key.data_ptr(), spans.data_ptr(), out[0].data_ptr(),
        out[1].data_ptr() if peaks else None, spans.stride(0) if spans.shape[0] > 1 else 0,
        query.shape[0], query.shape[2], key.shape[2], *query.shape[1::2], per_block, block_size,
        torch.get_num_threads(),
    )  # fmt: skip
    if library().low_rank_masses(ctypes.byref(problem)):
        raise MemoryError("The compiled CPU kernel found no memory for its buffers.")
    return out


@masses_op.register_fake
def _empty_masses(
    query: Tensor, key: Tensor, spans: Tensor, per_block: int, block_size: int, peaks: bool
) -> Tensor:
    rows, columns = ceil_div(query.shape[2], per_block), ceil_div(key.shape[2], block_size)
    return query.new_empty(1 + peaks, *query.shape[:2], rows, columns)


def best_blocks(scores: Tensor, intervals: Tensor, budget: Tensor, width: int) -> Tensor:
    """Forced blocks and the best others: booleans ``(b, p, i, j)``, of what a row sees.

    Args:
        scores: ``(b, p, i, j)`` of all key blocks.
        intervals: ``rule.intervals(rows)``.
        budget: Blocks of each row, forced ones included, integers ``(b, p, i)``.
        width: An upper bound of it.
    """
    from dilated_attention_pytorch.ops.block_selection.choice import choose_op

    counts, indices, _, _ = choose_op(
        scores, None, intervals, budget.int(), None, None, 0, 0, width, False
    )
    used = torch.arange(width, device=scores.device) < counts[..., None]
    # What fills up a list names its first block again.
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(
        -1, torch.where(used, indices, indices[..., :1]).long(), True
    )


def threshold_lists(
    scores: Tensor, intervals: Tensor, threshold: float | Tensor, least: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forced blocks and those whose share of the softmaxed scores reaches a threshold.

    Args:
        scores: ``(b, p, i, j)`` of all key blocks.
        intervals: ``rule.intervals(rows)``.
        threshold: In [0, 1], for all rows or ``(1 or b, 1 or p, 1 or i)``.
        least: What a row keeps at least, forced blocks included, the best ones: integers that
            broadcast to ``(b, p, i)``. None: the forced ones.
        kept: Booleans ``(b, p, i, j)``: blocks that are kept in any case. None: the forced ones.

    Returns:
        Counts ``(b, p, i)`` and ascending lists ``(b, p, i, j)``, int32.
    """
    from dilated_attention_pytorch.ops.block_selection.choice import choose_op
    from dilated_attention_pytorch.ops.block_selection.threshold import threshold_op

    given = (0.0, threshold) if isinstance(threshold, Tensor) else (threshold, None)
    found: tuple[Tensor, Tensor] = threshold_op(scores, intervals, *given, kept)
    if least is None:
        return found
    # What reaches a threshold are a row's best blocks, so the larger number of blocks decides.
    budget = torch.maximum(found[0], least.int())
    scores = first_of_all(scores, kept)
    counts, indices, _, _ = choose_op(
        scores, None, intervals, budget, None, None, 0, 0, scores.shape[-1], False
    )
    return counts, indices


def count_above(
    scores: Tensor,
    candidates: Tensor | None,
    intervals: Tensor,
    threshold: Tensor,
    most: Tensor,
    weights: Tensor,
) -> Tensor:
    """:func:`blocks_above` of what a rule scores, without temporaries of the scores' size.

    Args:
        scores: ``(b, p, i, c)``.
        candidates: From :func:`find_candidates`; without them the heads compete.
        intervals: ``rule.intervals(rows)``.
        threshold: 0-dim float32.
        most: The most that a row may get, integers that broadcast to ``(b, p, i)``.
        weights: Of the heads, ``(p,)`` float32.

    Returns:
        int32 ``(b, p, i)``. No gradient.
    """
    from dilated_attention_pytorch.ops.block_selection.threshold import above_op

    most = most.to(torch.int32).expand(-1, -1, scores.shape[2])
    found: Tensor = above_op(scores.detach(), candidates, intervals, threshold, most, weights)
    return found


class _Newest(ctypes.Structure):
    """``Newest`` of ``cpp_newest.cpp``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "queries", "key", "query_map", "key_map", "lengths", "known", "starts", "threshold",
            "least", "quota", "masses", "peaks", "sampled", "counts", "indices",
        )),
        ("key_step", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64 * 2) for name in ("least_step", "quota_step")),
        *((name, ctypes.c_int64) for name in (
            "threshold_step", "batch", "ring", "heads", "kv_heads", "lists", "head_dim", "rank",
            "capacity", "blocks", "room", "width", "block_size", "stride", "sinks", "near",
            "threads",
        )),
        ("scale", ctypes.c_double),
    )  # fmt: skip


def list_newest(
    queries: Tensor,
    key: Tensor,
    maps: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor, Tensor | None],
    threshold: float | Tensor,
    least: Tensor | None,
    quota: Tensor | None,
    sums: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Tensor, Tensor],
    *,
    blocks: int,
    block_size: int,
    stride: int,
    scale: float,
    sinks: int,
    near: int,
    compiled: bool = False,
) -> None:
    """Lists the blocks that a new token reads by the low-rank mass of its row's queries, in place.

    Args:
        queries: Ring buffer ``(b, ring, h, d)``, the new token's query included.
        key: Cache ``(b, capacity, g, d)``, its key included.
        maps: Of queries and keys, ``(h, d, r)``.
        lengths: Tokens ``(b,)`` int64 of each sample; the first whose query is known; and the place
            of token 0, or None: 0.
        threshold: On a block's share of what the row's queries expect, or ``(1 or b, 1, 1)``.
        least: What the row keeps at least, forced blocks included, int32 ``(1 or b, 1 or p, 1)``.
        quota: What it keeps by peaks, likewise; None: nothing, and peaks are not kept.
        sums: Masses and peaks of a state, ``(b, p, J + 1)`` float32, and which query is in them,
            ``(b, p)`` int64: the newest one is added.
        lists: Counts ``(b, p)`` and numbers ``(b, p, k)``, int32.
        blocks: Key blocks to choose from.
        block_size: Tokens per block.
        stride: Every so many queries of a row count.
        scale: Factor of the logits.
        sinks: First blocks that every row reads.
        near: Blocks before a row's own that it reads.
        compiled: By the compiled kernel of the CPU, in float32.
    """
    numbers = blocks, block_size, stride, scale, sinks, near
    if not compiled:
        from dilated_attention_pytorch.ops.block_selection.newest import list_newest_op

        given = (0.0, threshold) if isinstance(threshold, Tensor) else (threshold, None)
        list_newest_op(queries, key, *maps, *lengths, *given, least, quota, *sums, *lists, *numbers)
        return
    if not isinstance(threshold, Tensor):
        threshold = torch.full((1,), threshold, dtype=torch.float32, device=key.device)
    key, starts = rows_of(key), lengths[2]
    # In the order of the fields; the tuple keeps what is made here alive during the call.
    tensors = (
        queries, key, *(x.float().contiguous() for x in maps), *lengths[:2],
        None if starts is None else starts.long().contiguous(), threshold.float(), least, quota,
        sums[0], None if quota is None else sums[1], sums[2], *lists,
    )  # fmt: skip

    def steps(x: Tensor | None) -> tuple[int, ...]:
        if x is None:
            return 0, 0
        return tuple(s if n > 1 else 0 for s, n in zip(x.stride()[:2], x.shape[:2], strict=True))

    problem = _Newest(
        *(None if x is None else x.data_ptr() for x in tensors),
        key.stride()[:3], steps(least), steps(quota), threshold.stride(0) * (len(threshold) > 1),
        *queries.shape[:3], key.shape[2], lists[1].shape[1], key.shape[3], maps[0].shape[2],
        key.shape[1], blocks, sums[0].shape[2], lists[1].shape[2], block_size, stride, sinks, near,
        torch.get_num_threads(), scale,
    )  # fmt: skip
    if lists[1].numel() and library().list_newest(ctypes.byref(problem)):
        raise MemoryError("The compiled CPU kernel found no memory for its buffers.")


def transpose_lists(pattern: BlockPattern) -> PatternTranspose:
    """``BlockPattern.transpose`` by counting; entries past the last offset are undefined."""
    from dilated_attention_pytorch.ops.block_selection.transpose import transpose_op

    return PatternTranspose(
        *transpose_op(pattern.kv_num_blocks, pattern.kv_indices, pattern.num_key_blocks)
    )


if HAS_TRITON:
    TRANSPOSERS["cuda"] = transpose_lists
