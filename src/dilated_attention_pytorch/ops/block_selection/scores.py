"""Scores of the bilinear scorer: towers, products, and the kept tiles' gradient.

With the summaries x_i of a query block and y_j of a key block, and the maps A and B of the H heads
that share a pattern, the score is

    s_ij = gain · factor · Σ_h (x_i A_h) · (y_j B_h),

one product of *towers* q_i and k_j, in which those heads' maps lie side by side. All candidates'
scores carry no gradient; those of the kept tiles do: from their g_ij, ``dq_i = Σ_j g_ij k_j`` and
``dk_j = Σ_i g_ij q_i``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.ops.operators import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.triton_device import (
    PRECISE,
    VARYING,
    follow,
    on_device,
    overlap,
    plane_strides,
)

# Candidates of one row that a program reads at a time.
_TILE = 64


@triton.jit(do_not_specialize=VARYING)
def tower_kernel(
    queries, q_stride_b, q_stride_h, q_stride_i, keys, k_stride_b, k_stride_h, k_stride_i,
    query_weight, key_weight, gain, query_out, key_out,
    num_query_rows, num_key_rows, heads, query_group, key_group, share, factor,
    ROWS: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
    R: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First maps of one head's summaries; heads that share a pattern lie side by side.

    The first programs take the queries, with the gain; the others the keys.
    """
    follow(PDL)
    query_tiles = tl.cdiv(num_query_rows, ROWS)
    tile = tl.program_id(0)
    of_keys = tile >= query_tiles
    row = tl.where(of_keys, tile - query_tiles, tile) * ROWS + tl.arange(0, ROWS)
    num_rows = tl.where(of_keys, num_key_rows, num_query_rows)
    summaries = tl.where(of_keys, keys, queries)
    s_stride_b = tl.where(of_keys, k_stride_b, q_stride_b)
    s_stride_h = tl.where(of_keys, k_stride_h, q_stride_h)
    s_stride_i = tl.where(of_keys, k_stride_i, q_stride_i)
    weight = tl.where(of_keys, key_weight, query_weight)
    group = tl.where(of_keys, key_group, query_group)
    head = tl.program_id(1) % heads
    batch = tl.cast(tl.program_id(1) // heads, tl.int64)
    rank = tl.arange(0, R)
    source = summaries + batch * s_stride_b + tl.cast(head // group, tl.int64) * s_stride_h
    acc = tl.zeros([ROWS, R], tl.float32)
    for start in tl.static_range(0, S, PART):
        place = start + tl.arange(0, PART)
        x = tl.load(
            source + row.to(tl.int64)[:, None] * s_stride_i + place[None, :],
            mask=(row < num_rows)[:, None] & (place < SIZE)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        w = tl.load(
            weight + (head * SIZE + place)[:, None] * RANK + rank[None, :],
            mask=(place < SIZE)[:, None] & (rank < RANK)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        acc = tl.dot(x, w, acc, input_precision=PRECISE)
    acc = acc * tl.where(of_keys, 1.0, tl.load(gain).to(tl.float32) * factor)
    plane = batch * (heads // share) + head // share
    out = tl.where(of_keys, key_out, query_out)
    target = out + (plane * num_rows + row.to(tl.int64)) * (share * RANK) + head % share * RANK
    tl.store(
        target[:, None] + rank[None, :],
        acc,
        mask=(row < num_rows)[:, None] & (rank < RANK)[None, :],
    )


@triton.jit(do_not_specialize=VARYING)
def product_kernel(
    query, key, scores, num_rows, num_keys,
    R: tl.constexpr, RANK: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of some rows of ``query`` with some rows of ``key``."""
    follow(PDL)
    if EVEN:
        # So that the compiler knows, and writes several scores at once.
        num_keys = num_keys // 16 * 16
    tiles = tl.cdiv(num_keys, C)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * C + tl.arange(0, C)
    plane = tl.cast(tl.program_id(1), tl.int64)
    of_row, of_column = (row < num_rows)[:, None], (column < num_keys)[:, None]
    total = tl.zeros([ROWS, C], tl.float32)
    for start in tl.static_range(0, R, PART):
        r = start + tl.arange(0, PART)[None, :]
        q = tl.load(
            query + (plane * num_rows + row)[:, None] * RANK + r,
            mask=of_row & (r < RANK), other=0.0,
        )  # fmt: skip
        k = tl.load(
            key + (plane * num_keys + column)[:, None] * RANK + r,
            mask=of_column & (r < RANK), other=0.0,
        )  # fmt: skip
        total = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), total, input_precision=PRECISE)
    target = scores + (plane * num_rows + row)[:, None] * num_keys + column[None, :]
    tl.store(target, total, mask=of_row & (column < num_keys)[None, :])


@triton.jit(do_not_specialize=VARYING)
def bilinear_kernel(
    query, key, candidates, c_stride_b, c_stride_h, c_stride_i, scores,
    num_rows, columns, num_keys, tiles, heads,
    R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Products of one row of ``query`` with the rows of ``key`` that its candidates name."""
    row = tl.program_id(0) // tiles % num_rows
    tile = tl.program_id(0) % tiles
    plane = tl.cast(tl.program_id(0) // tiles // num_rows, tl.int64)
    lane = tile * C + tl.arange(0, C)
    ok = lane < columns
    entries = candidates + plane // heads * c_stride_b + plane % heads * c_stride_h
    j = tl.load(entries + tl.cast(row, tl.int64) * c_stride_i + lane, mask=ok, other=-1)
    j = j.to(tl.int64)
    named = (j >= 0) & (j < num_keys)
    total = tl.zeros([C], tl.float32)
    for start in tl.static_range(0, R, PART):
        r = start + tl.arange(0, PART)
        q = tl.load(query + (plane * num_rows + row) * RANK + r, mask=r < RANK, other=0.0)
        k = tl.load(
            key + (plane * num_keys + j)[:, None] * RANK + r[None, :],
            mask=named[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(q.to(tl.float32)[None, :] * k.to(tl.float32), 1)
    tl.store(scores + (plane * num_rows + row) * columns + lane, total, mask=ok)


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

    The weights are ``(h, s, r)``. The queries' maps are multiplied by ``gain`` ``(1,)`` and by
    ``factor``. No gradient.
    """
    outs = _empty_towers(queries, keys, query_weight, key_weight, gain, factor, share)
    queries, keys = rows_of(queries), rows_of(keys)
    heads, size, rank = query_weight.shape
    batch, rows, num_keys = queries.shape[0], queries.shape[2], keys.shape[2]
    tile = 64
    tiles = triton.cdiv(rows, tile) + triton.cdiv(num_keys, tile)
    if tiles == 0 or batch == 0:
        return outs
    with on_device(queries.device):
        tower_kernel[(tiles, batch * heads)](
            queries, *queries.stride()[:3], keys, *keys.stride()[:3],
            query_weight.contiguous(), key_weight.contiguous(), gain, *outs, rows, num_keys, heads,
            heads // queries.shape[1], heads // keys.shape[1], share, factor,
            ROWS=tile, S=triton.next_power_of_2(size), SIZE=size,
            PART=min(max(triton.next_power_of_2(size), 16), 64),
            R=max(triton.next_power_of_2(rank), 16), RANK=rank, num_warps=4,
            **overlap(queries.device),
        )  # fmt: skip
    return outs


@towers_op.register_fake
def _empty_towers(
    queries: Tensor, keys: Tensor, query_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    share = rest[-1]
    heads, _, rank = query_weight.shape
    of_queries, of_keys = (
        x.new_empty(x.shape[0], heads // share, x.shape[2], share * rank, dtype=torch.float32)
        for x in (queries, keys)
    )
    return of_queries, of_keys


@torch.library.custom_op(f"{NAMESPACE}::all_products", mutates_args=())
def products_op(query: Tensor, key: Tensor) -> Tensor:
    """``(b, p, i, j)`` float32: rows of ``query`` (b, p, i, r) times rows of ``key`` (b, p, j, r).

    No gradient.
    """
    scores = _empty_products(query, key)
    batch, heads, rows, rank = query.shape
    if scores.numel() == 0:
        return scores
    keys = key.shape[2]
    part = min(max(triton.next_power_of_2(rank), 16), 32)
    tile = 128
    tiles = triton.cdiv(rows, 64) * triton.cdiv(keys, tile)
    with on_device(query.device):
        product_kernel[(tiles, batch * heads)](
            query.contiguous(), key.contiguous(), scores, rows, keys,
            R=triton.cdiv(rank, part) * part, RANK=rank, PART=part, ROWS=64, C=tile,
            EVEN=keys % 16 == 0, num_warps=4, **overlap(query.device),
        )  # fmt: skip
    return scores


@products_op.register_fake
def _empty_products(query: Tensor, key: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::candidate_products", mutates_args=())
def bilinear_op(query: Tensor, key: Tensor, candidates: Tensor) -> Tensor:
    """``(b, p, i, c)`` float32: rows of ``query`` times the candidates' rows of ``key``."""
    scores = _empty_bilinear(query, key, candidates)
    batch, heads, rows, rank = query.shape
    if scores.numel() == 0:
        return scores
    columns = scores.shape[-1]
    part = min(triton.next_power_of_2(rank), 32)
    tiles = triton.cdiv(columns, _TILE)
    with on_device(query.device):
        bilinear_kernel[(tiles * rows * batch * heads,)](
            query.contiguous(), key.contiguous(), candidates, *plane_strides(candidates),
            candidates.stride(2), scores, rows, columns, key.shape[2], tiles, heads,
            R=triton.cdiv(rank, part) * part, RANK=rank, C=_TILE, PART=part, num_warps=2,
        )  # fmt: skip
    return scores


@bilinear_op.register_fake
def _empty_bilinear(query: Tensor, key: Tensor, candidates: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], candidates.shape[3], dtype=torch.float32)


@triton.jit(do_not_specialize=VARYING)
def kept_query_grad_kernel(
    grad, key, indices, counts, grad_query, num_rows, num_keys, width,
    R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of one query row: the kept tiles' gradients times their key rows."""
    row = tl.program_id(0) % num_rows
    plane = tl.cast(tl.program_id(0) // num_rows, tl.int64)
    place = plane * num_rows + row
    r = tl.program_id(1) * R + tl.arange(0, R)
    lane = tl.arange(0, C)
    count = tl.load(counts + place)
    total = tl.zeros([R], tl.float32)
    for start in range(0, count, C):
        slot = start + lane
        ok = slot < count
        j = tl.load(indices + place * width + slot, mask=ok, other=0).to(tl.int64)
        g = tl.load(grad + place * width + slot, mask=ok, other=0.0)
        k = tl.load(
            key + (plane * num_keys + j)[:, None] * RANK + r[None, :],
            mask=ok[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(g.to(tl.float32)[:, None] * k.to(tl.float32), 0)
    target = grad_query + place * RANK + r
    tl.store(target, total.to(grad_query.dtype.element_ty), mask=r < RANK)


@triton.jit(do_not_specialize=VARYING)
def kept_key_grad_kernel(
    grad, query, offsets, slots, grad_key, num_rows, num_keys, width,
    R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of one key row, over the tiles that the transpose lists for it."""
    j = tl.program_id(0) % num_keys
    plane = tl.cast(tl.program_id(0) // num_keys, tl.int64)
    r = tl.program_id(1) * R + tl.arange(0, R)
    lane = tl.arange(0, C)
    first = tl.load(offsets + plane * (num_keys + 1) + j)
    last = tl.load(offsets + plane * (num_keys + 1) + j + 1)
    total = tl.zeros([R], tl.float32)
    for start in range(first, last, C):
        entry = start + lane
        ok = entry < last
        slot = tl.load(slots + plane * num_rows * width + entry, mask=ok, other=0)
        g = tl.load(grad + plane * num_rows * width + slot, mask=ok, other=0.0)
        i = (slot // width).to(tl.int64)
        q = tl.load(
            query + (plane * num_rows + i)[:, None] * RANK + r[None, :],
            mask=ok[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(g.to(tl.float32)[:, None] * q.to(tl.float32), 0)
    target = grad_key + (plane * num_keys + j) * RANK + r
    tl.store(target, total.to(grad_key.dtype.element_ty), mask=r < RANK)


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
    """Gradients of both towers, over the kept tiles alone; deterministic.

    ``grad`` ``(b, p, i, k)`` is contiguous; ``offsets`` and ``slots`` are ``PatternTranspose``'s.
    """
    query, key = query.contiguous(), key.contiguous()
    grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
    (batch, heads, rows, rank), keys, width = query.shape, key.shape[2], indices.shape[3]
    if width == 0 or rows == 0 or keys == 0 or batch == 0:
        return grad_query.zero_(), grad_key.zero_()
    r = min(triton.next_power_of_2(rank), 64)
    sizes = {"R": r, "RANK": rank, "C": 32, "num_warps": 2}
    with on_device(query.device):
        kept_query_grad_kernel[(rows * batch * heads, triton.cdiv(rank, r))](
            grad,
            key,
            indices.contiguous(),
            counts.contiguous(),
            grad_query,
            rows,
            keys,
            width,
            **sizes,
        )
        kept_key_grad_kernel[(keys * batch * heads, triton.cdiv(rank, r))](
            grad, query, offsets, slots, grad_key, rows, keys, width, **sizes
        )
    return grad_query, grad_key


@kept_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    query, key, _, *lists = inputs
    ctx.save_for_backward(query, key, *lists)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *kept_backward_op(grad.contiguous(), *ctx.saved_tensors), *(None,) * 5


kept_op.register_autograd(_backward, setup_context=_setup_context)
