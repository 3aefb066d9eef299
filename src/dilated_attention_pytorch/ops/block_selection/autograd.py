"""The selection kernels as PyTorch operators: functional, traceable, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_selection import triton_launch as launch

NAMESPACE = "dilated_attention_pytorch"


def rows_of(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous, which is all that the kernels ask for."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::block_summaries", mutates_args=())
def summaries_op(
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: str,
    block_size: int,
    want_place: bool,
) -> tuple[Tensor, Tensor]:
    """Summaries ``(b, h, i, s)`` in float32 and where extremes lie (empty unless wanted).

    ``pooling`` joins the names by commas; ``valid`` is boolean.
    """
    how = launch.Pooling(tuple(pooling.split(",")), block_size)
    out, place = _empty_summaries(x, pooling, block_size, want_place)
    tokens = launch.Tokens(x, valid, pool_query, out)
    launch.launch_summaries(tokens, how, place if want_place else None)
    return out, place


def _empty_summaries(
    x: Tensor, pooling: str, block_size: int, want_place: bool
) -> tuple[Tensor, Tensor]:
    b, n, h, d = x.shape
    blocks = ceil_div(n, block_size)
    shape = (b, h, blocks, 2, d) if want_place else (0,)
    return (
        x.new_empty((b, h, blocks, d * (pooling.count(",") + 1)), dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int16),
    )


@summaries_op.register_fake
def _(
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: str,
    block_size: int,
    want_place: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_summaries(x, pooling, block_size, want_place)


@torch.library.custom_op(f"{NAMESPACE}::block_summaries_backward", mutates_args=())
def summaries_backward_op(
    grad: Tensor,
    place: Tensor,
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: str,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the pool query (empty without one)."""
    how = launch.Pooling(tuple(pooling.split(",")), block_size)
    b, n, h, d = x.shape
    grad_x = x.new_empty(b, n, h, d)
    if pool_query is None:
        launch.launch_summaries_grad(grad, place, x, valid, None, how, grad_x, None)
        return grad_x, x.new_empty(0)
    # Each block writes its share, so that the sum is deterministic.
    shares = x.new_zeros(b, h, grad.shape[2], d, dtype=torch.float32)
    launch.launch_summaries_grad(grad, place, x, valid, pool_query, how, grad_x, shares)
    return grad_x, shares.sum((0, 2)).to(pool_query.dtype)


@summaries_backward_op.register_fake
def _(
    grad: Tensor,
    place: Tensor,
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: str,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    pool = x.new_empty(0) if pool_query is None else torch.empty_like(pool_query)
    return x.new_empty(x.shape), pool


def _keep_summaries(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, valid, pool_query, ctx.pooling, ctx.block_size, _ = inputs
    ctx.save_for_backward(output[1], x, valid, pool_query)
    ctx.set_materialize_grads(False)


def _summaries_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    place, x, valid, pool_query = ctx.saved_tensors
    if grad is None:
        return (None,) * 6
    grad_x, grad_pool = summaries_backward_op(
        grad.contiguous(), place, x, valid, pool_query, ctx.pooling, ctx.block_size
    )
    return grad_x, None, None if pool_query is None else grad_pool, None, None, None


summaries_op.register_autograd(_summaries_backward, setup_context=_keep_summaries)


@torch.library.custom_op(f"{NAMESPACE}::block_summaries_of_both", mutates_args=())
def both_summaries_op(
    x: Tensor,
    y: Tensor,
    x_valid: Tensor | None,
    y_valid: Tensor | None,
    x_pool: Tensor | None,
    y_pool: Tensor | None,
    pooling: str,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """:func:`summaries_op` of two tensors in one launch; no gradient.

    Both or neither have ``valid``, likewise a pool query; dtype, batch and head_dim are equal.
    """
    how = launch.Pooling(tuple(pooling.split(",")), block_size)
    outs = [_empty_summaries(t, pooling, block_size, False)[0] for t in (x, y)]
    launch.launch_summaries(
        launch.Tokens(x, x_valid, x_pool, outs[0]), how,
        second=launch.Tokens(y, y_valid, y_pool, outs[1]),
    )  # fmt: skip
    return outs[0], outs[1]


@both_summaries_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    x_valid: Tensor | None,
    y_valid: Tensor | None,
    x_pool: Tensor | None,
    y_pool: Tensor | None,
    pooling: str,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    x_out, y_out = (_empty_summaries(t, pooling, block_size, False)[0] for t in (x, y))
    return x_out, y_out


@torch.library.custom_op(f"{NAMESPACE}::row_budget", mutates_args=())
def budget_op(
    means: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    base_sparsity: Tensor,
    rule: Tensor,
    diagonal: Tensor,
    document: Tensor,
    forced: Tensor,
    limit: Tensor,
    filled: Tensor,
    rising: Tensor,
    visible: Tensor,
    batch: int,
    heads: int,
    has_diagonal: bool,
    max_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Real-valued budgets ``(b, p, i)``, their slope in the content's factor, the complexity."""
    # A compiler may lay its own tensors out in another way than eager PyTorch.
    call = launch.BudgetInputs(
        None if means is None else rows_of(means), gain, offset, base_sparsity,
        rule.contiguous(), diagonal.contiguous(), document.contiguous(), forced.contiguous(),
        limit.contiguous(), filled.contiguous(), rising.contiguous(), visible.contiguous(),
        has_diagonal, max_factor,
    )  # fmt: skip
    exact, slope, complexity = _empty_budget(rule, batch, heads)
    launch.launch_budget(call, exact, slope, complexity)
    return exact, slope, complexity


def _empty_budget(rule: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    def per_row() -> Tensor:
        return rule.new_empty(batch, heads, rule.shape[2], dtype=torch.float32)

    return per_row(), per_row(), per_row()


@budget_op.register_fake
def _(
    means: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    base_sparsity: Tensor,
    rule: Tensor,
    diagonal: Tensor,
    document: Tensor,
    forced: Tensor,
    limit: Tensor,
    filled: Tensor,
    rising: Tensor,
    visible: Tensor,
    batch: int,
    heads: int,
    has_diagonal: bool,
    max_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_budget(rule, batch, heads)


def _keep_budget(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[1:3]]
    ctx.set_materialize_grads(False)


def _budget_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    slope, complexity = ctx.saved_tensors
    none = (None,) * 13
    if grad is None or ctx.dtypes[0] is None:
        return None, None, None, *none
    pull = grad * slope
    of_gain = (pull * complexity).sum((0, 2)).to(ctx.dtypes[0])
    return None, of_gain, pull.sum((0, 2)).to(ctx.dtypes[1]), *none


budget_op.register_autograd(_budget_backward, setup_context=_keep_budget)


@torch.library.custom_op(f"{NAMESPACE}::round_budget", mutates_args=())
def round_op(exact: Tensor, bits: int) -> Tensor:
    """int32 budgets whose running sums follow the exact ones; one document."""
    rounded = exact.new_empty(exact.shape, dtype=torch.int32)
    launch.launch_round(exact.contiguous(), rounded, bits)
    return rounded


@round_op.register_fake
def _(exact: Tensor, bits: int) -> Tensor:
    return exact.new_empty(exact.shape, dtype=torch.int32)


@torch.library.custom_op(f"{NAMESPACE}::choose_blocks", mutates_args=())
def choose_op(
    scores: Tensor,
    candidates: Tensor | None,
    rule: Tensor,
    budget: Tensor | None,
    seed: Tensor | None,
    temperature: Tensor | None,
    fixed_count: int,
    explore: int,
    width: int,
    want_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, lists, and (if wanted) the kept tiles' scores and whether each was not forced."""
    call = launch.ChooseInputs(
        rows_of(scores), candidates, rule.contiguous(),
        None if budget is None else budget.contiguous(), seed, temperature, fixed_count, explore,
    )  # fmt: skip
    counts, indices, kept, scored = _empty_choice(scores, width, want_kept)
    launch.launch_choose(
        call, counts, indices, kept if want_kept else None, scored if want_kept else None
    )
    return counts, indices, kept, scored


def _empty_choice(
    scores: Tensor, width: int, want_kept: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, p, i, _ = scores.shape
    shape = (b, p, i, width)
    side = shape if want_kept else (0,)
    return (
        scores.new_empty((b, p, i), dtype=torch.int32),
        scores.new_empty(shape, dtype=torch.int32),
        scores.new_empty(side, dtype=torch.float32),
        scores.new_empty(side, dtype=torch.bool),
    )


@choose_op.register_fake
def _(
    scores: Tensor,
    candidates: Tensor | None,
    rule: Tensor,
    budget: Tensor | None,
    seed: Tensor | None,
    temperature: Tensor | None,
    fixed_count: int,
    explore: int,
    width: int,
    want_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_choice(scores, width, want_kept)


@torch.library.custom_op(f"{NAMESPACE}::scorer_towers", mutates_args=())
def towers_op(
    queries: Tensor,
    keys: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gain: Tensor,
    factor: float,
    share: int,
) -> tuple[Tensor, Tensor]:
    """``(b, h / share, i or j, share * r)`` float32: first maps of summaries (b, g, i or j, s).

    The queries' are multiplied by ``gain`` and by ``factor``. No gradient.
    """
    outs = _empty_tower(queries, query_weight, share), _empty_tower(keys, key_weight, share)
    launch.launch_towers(
        rows_of(queries), rows_of(keys), query_weight.contiguous(), key_weight.contiguous(),
        gain, factor, outs,
    )  # fmt: skip
    return outs


def _empty_tower(summaries: Tensor, weight: Tensor, share: int) -> Tensor:
    heads, _, rank = weight.shape
    shape = (summaries.shape[0], heads // share, summaries.shape[2], share * rank)
    return summaries.new_empty(shape, dtype=torch.float32)


@towers_op.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gain: Tensor,
    factor: float,
    share: int,
) -> tuple[Tensor, Tensor]:
    return _empty_tower(queries, query_weight, share), _empty_tower(keys, key_weight, share)


@torch.library.custom_op(f"{NAMESPACE}::all_products", mutates_args=())
def products_op(query: Tensor, key: Tensor) -> Tensor:
    """``(b, p, i, j)`` float32: rows of ``query`` times rows of ``key``; no gradient."""
    scores = query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)
    launch.launch_products(query.contiguous(), key.contiguous(), scores)
    return scores


@products_op.register_fake
def _(query: Tensor, key: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::candidate_products", mutates_args=())
def bilinear_op(query: Tensor, key: Tensor, candidates: Tensor) -> Tensor:
    """``(b, p, i, c)`` float32: rows of ``query`` times the candidates' rows of ``key``."""
    scores = query.new_empty(*query.shape[:3], candidates.shape[3], dtype=torch.float32)
    launch.launch_bilinear(query.contiguous(), key.contiguous(), candidates, scores)
    return scores


@bilinear_op.register_fake
def _(query: Tensor, key: Tensor, candidates: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], candidates.shape[3], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::mlp_scores", mutates_args=())
def mlp_op(
    query: Tensor,
    key: Tensor,
    candidates: Tensor | None,
    bias: Tensor,
    hidden: Tensor,
    out: Tensor,
    gain: Tensor,
    pattern_heads: int,
) -> Tensor:
    """``(b, p, i, c)`` float32: the MLP's scores; no gradient."""
    scores = _empty_mlp(query, key, candidates, pattern_heads)
    network = launch.Network(bias, hidden, out, gain)
    launch.launch_mlp(query.contiguous(), key.contiguous(), candidates, network, scores)
    return scores


def _empty_mlp(query: Tensor, key: Tensor, candidates: Tensor | None, pattern_heads: int) -> Tensor:
    columns = key.shape[2] if candidates is None else candidates.shape[3]
    shape = (query.shape[0], pattern_heads, query.shape[2], columns)
    return query.new_empty(shape, dtype=torch.float32)


@mlp_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    candidates: Tensor | None,
    bias: Tensor,
    hidden: Tensor,
    out: Tensor,
    gain: Tensor,
    pattern_heads: int,
) -> Tensor:
    return _empty_mlp(query, key, candidates, pattern_heads)


@torch.library.custom_op(f"{NAMESPACE}::kept_scores", mutates_args=())
def kept_op(
    query: Tensor,
    key: Tensor,
    kept: Tensor,
    counts: Tensor,
    indices: Tensor,
    offsets: Tensor,
    slots: Tensor,
) -> Tensor:
    """The kept tiles' scores, tied to the towers that they are products of."""
    return kept.clone()


@kept_op.register_fake
def _(query: Tensor, key: Tensor, kept: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(kept)


@torch.library.custom_op(f"{NAMESPACE}::kept_scores_backward", mutates_args=())
def kept_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    counts: Tensor,
    indices: Tensor,
    offsets: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of both towers, over the kept tiles alone; deterministic."""
    query, key = query.contiguous(), key.contiguous()
    grads = torch.empty_like(query), torch.empty_like(key)
    launch.launch_kept_grad(
        grad, query, key, counts.contiguous(), indices.contiguous(), offsets, slots, *grads
    )
    return grads


@kept_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _keep_kept(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    query, key, _, *lists = inputs
    ctx.save_for_backward(query, key, *lists)


def _kept_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_query, of_key = kept_backward_op(grad.contiguous(), *ctx.saved_tensors)
    return of_query, of_key, None, None, None, None, None


kept_op.register_autograd(_kept_backward, setup_context=_keep_kept)


@torch.library.custom_op(f"{NAMESPACE}::transpose_lists", mutates_args=())
def transpose_op(counts: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Offsets ``(b, h, j + 1)`` and slots ``(b, h, i * k)`` of packed ascending lists."""
    offsets, slots = _empty_transpose(indices, columns)
    launch.launch_transpose(counts.contiguous(), indices.contiguous(), offsets, slots)
    return offsets, slots


def _empty_transpose(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    b, h, i, k = indices.shape
    return indices.new_empty(b, h, columns + 1), indices.new_empty(b, h, i * k)


@transpose_op.register_fake
def _(counts: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    return _empty_transpose(indices, columns)


@torch.library.custom_op(f"{NAMESPACE}::lattice_candidates", mutates_args=())
def lattice_op(
    rule: Tensor,
    diagonal: Tensor,
    segments: list[int],
    rates: list[int],
    heads: int,
    sinks: int,
    near: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending candidates ``(1 or b, p, i, c)`` int32 (-1: none), forced and all per row."""
    candidates, forced, limit = _empty_lattice(rule, segments, rates, heads, sinks, near)
    groups = tuple(zip(segments, rates, strict=True))
    launch.launch_lattice(
        rule.contiguous(), diagonal.contiguous(), groups, sinks, near, candidates, forced, limit
    )
    return candidates, forced, limit


def _empty_lattice(
    rule: Tensor, segments: list[int], rates: list[int], heads: int, sinks: int, near: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, i = rule.shape
    lattice = [ceil_div(s, r) for s, r in zip(segments, rates, strict=True)]
    return (
        rule.new_empty(b, heads, i, sinks + near + sum(lattice)),
        rule.new_empty(b, heads, i),
        rule.new_empty(b, heads, i),
    )


@lattice_op.register_fake
def _(
    rule: Tensor,
    diagonal: Tensor,
    segments: list[int],
    rates: list[int],
    heads: int,
    sinks: int,
    near: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_lattice(rule, segments, rates, heads, sinks, near)
