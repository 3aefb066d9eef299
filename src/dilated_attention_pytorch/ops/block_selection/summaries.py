"""Summaries of blocks of tokens: mean, maximum, minimum and attention pooling in one read.

Of the tokens x_1 ... x_t of one block and head that count, side by side in the order asked for:

* ``mean``: ``Σ x / t``; ``max``, ``min``: per dimension;
* ``attention``: ``Σ a x`` with ``a = softmax(u · x)`` and the head's pool query u.

A block without tokens that count gives 0. Of tokens that share an extreme the first takes the
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.operators import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.triton_device import (
    VARYING,
    batch_stride,
    follow,
    on_device,
    overlap,
    strides,
)

# Tokens that one warp summarises at a time.
_TOKENS = 16


@triton.jit
def _first_best(best, first, tile, inside, step, T: tl.constexpr, PLACE: tl.constexpr,
                FULL: tl.constexpr):  # fmt: skip
    """Running maximum over tokens, and the token that first reached it."""
    filled = tile if FULL else tl.where(inside[:, None], tile, float("-inf"))
    here = tl.max(filled, 0)
    if PLACE:
        reached = (filled == here[None, :]) & inside[:, None]
        token = tl.min(tl.where(reached, step[:, None], T), 0)
        first = tl.where(here > best, token, first)
    return tl.maximum(best, here), first


@triton.jit(do_not_specialize=VARYING)
def summary_kernel(
    x, x_stride_b, x_stride_h, x_stride_n,
    y, y_stride_b, y_stride_h, y_stride_n,
    x_valid, x_valid_stride_b, y_valid, y_valid_stride_b, x_pool, y_pool, x_out, y_out, place,
    starts, starts_stride_b, length, blocks, heads, y_length, y_blocks, y_heads,
    BLOCK: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    MEAN: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr, ATTENTION: tl.constexpr,
    POOLINGS: tl.constexpr, VALID: tl.constexpr, PLACE: tl.constexpr, FULL: tl.constexpr,
    PAIR: tl.constexpr, SHIFT: tl.constexpr, STARTS: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """All poolings of one block and head; the four names are places in the output or -1.

    Tokens are read ``CHUNK`` at a time, so that few registers and no barriers hold up the reading,
    which is all that this kernel waits for. With ``PAIR`` the programs after those of ``x``
    summarise ``y``. ``FULL``: every block is complete and all tokens count. The blocks of ``x``
    begin ``SHIFT`` tokens early (``past_windows``), and with ``STARTS`` not before their document.
    """
    follow(PDL)
    program = tl.program_id(0)
    batch = tl.cast(tl.program_id(1), tl.int64)
    valid, valid_stride_b, pool_query, out = x_valid, x_valid_stride_b, x_pool, x_out
    shift = SHIFT
    if PAIR:
        second = program >= heads * blocks
        program = tl.where(second, program - heads * blocks, program)
        shift = tl.where(second, 0, SHIFT)
        x = tl.where(second, y, x)
        x_stride_b = tl.where(second, y_stride_b, x_stride_b)
        x_stride_h = tl.where(second, y_stride_h, x_stride_h)
        x_stride_n = tl.where(second, y_stride_n, x_stride_n)
        valid = tl.where(second, y_valid, valid)
        valid_stride_b = tl.where(second, y_valid_stride_b, valid_stride_b)
        pool_query = tl.where(second, y_pool, pool_query)
        out = tl.where(second, y_out, out)
        length = tl.where(second, y_length, length)
        blocks = tl.where(second, y_blocks, blocks)
        heads = tl.where(second, y_heads, heads)
    # Heads run fastest: neighbouring programs read neighbouring memory.
    head = program % heads
    block = program // heads
    column = tl.arange(0, D)
    real = column < HEAD_DIM
    source = x + batch * x_stride_b + tl.cast(head, tl.int64) * x_stride_h
    begin = 0
    if STARTS:
        shifted = shift > 0 if PAIR else block >= 0
        begin = tl.load(starts + batch * starts_stride_b + block, mask=shifted, other=0) * BLOCK
    if ATTENTION >= 0:
        u = tl.load(pool_query + head * HEAD_DIM + column, mask=real, other=0.0).to(tl.float32)
    count = 0
    total = tl.zeros([D], tl.float32)
    highest = tl.full([D], float("-inf"), tl.float32)
    lowest = tl.full([D], float("-inf"), tl.float32)
    highest_at = tl.full([D], T, tl.int32)
    lowest_at = tl.full([D], T, tl.int32)
    pooled = tl.zeros([D], tl.float32)
    peak = -3.0e38
    weights = 0.0
    for chunk in tl.static_range(0, T, CHUNK):
        step = chunk + tl.arange(0, CHUNK)
        token = block * BLOCK + step - shift
        inside = (step < BLOCK) & (token < length)
        if SHIFT > 0:
            inside = inside & (token >= begin)
        if VALID:
            kept = tl.load(valid + batch * valid_stride_b + token, mask=inside, other=0)
            inside = inside & (kept != 0)
        tile = tl.load(
            source + token.to(tl.int64)[:, None] * x_stride_n + column[None, :],
            mask=real[None, :] if FULL else inside[:, None] & real[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        count += tl.sum(inside.to(tl.int32), 0)
        if MEAN >= 0:
            total += tl.sum(tile, 0)
        if MAX >= 0:
            highest, highest_at = _first_best(
                highest, highest_at, tile, inside, step, T, PLACE, FULL
            )
        if MIN >= 0:
            lowest, lowest_at = _first_best(lowest, lowest_at, -tile, inside, step, T, PLACE, FULL)
        if ATTENTION >= 0:
            logits = tl.where(inside, tl.sum(tile * u[None, :], 1), -3.0e38)
            new_peak = tl.maximum(peak, tl.max(logits, 0))
            weight = tl.where(inside, tl.exp(logits - new_peak), 0.0)
            shrink = tl.exp(peak - new_peak)
            pooled = pooled * shrink + tl.sum(weight[:, None] * tile, 0)
            weights = weights * shrink + tl.sum(weight, 0)
            peak = new_peak
    plane_block = (batch * heads + head) * blocks + block
    target = out + plane_block * (POOLINGS * HEAD_DIM) + column
    places = place + plane_block * (2 * HEAD_DIM) + column
    kind = out.dtype.element_ty
    if MEAN >= 0:
        mean = total / tl.maximum(count, 1)
        tl.store(target + MEAN * HEAD_DIM, mean.to(kind), mask=real)
    if MAX >= 0:
        best = tl.where(count > 0, highest, 0.0)
        tl.store(target + MAX * HEAD_DIM, best.to(kind), mask=real)
        if PLACE:
            tl.store(places, highest_at.to(tl.int16), mask=real)
    if MIN >= 0:
        best = tl.where(count > 0, -lowest, 0.0)
        tl.store(target + MIN * HEAD_DIM, best.to(kind), mask=real)
        if PLACE:
            tl.store(places + HEAD_DIM, lowest_at.to(tl.int16), mask=real)
    if ATTENTION >= 0:
        pooled = pooled / tl.where(weights > 0, weights, 1.0)
        tl.store(target + ATTENTION * HEAD_DIM, pooled.to(kind), mask=real)


@triton.jit
def _attention_weights(tile, u, inside):
    logits = tl.where(inside, tl.sum(tile * u[None, :], 1), -3.0e38)
    weight = tl.exp(logits - tl.max(logits, 0))
    weight = tl.where(inside, weight, 0.0)
    total = tl.sum(weight, 0)
    return weight / tl.where(total > 0, total, 1.0)


@triton.jit(do_not_specialize=VARYING)
def summary_grad_kernel(
    grad, place, x, x_stride_b, x_stride_h, x_stride_n,
    valid, v_stride_b, pool_query, grad_x, grad_pool, starts, starts_stride_b,
    more, more_stride_b, more_stride_h, more_stride_n, length, blocks, heads,
    BLOCK: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    MEAN: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr, ATTENTION: tl.constexpr,
    POOLINGS: tl.constexpr, VALID: tl.constexpr, SHIFT: tl.constexpr, STARTS: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    """Gradient of one block and head; ``grad_x`` is ``(b, n, h, d)``, every token is written.

    With ``MORE`` the gradient that the tokens got elsewhere is added, which saves a pass over them.
    With ``SHIFT`` the blocks begin that many tokens early, and one program more per head writes
    the tokens behind the last, which no block has.
    """
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    batch = tl.cast(tl.program_id(1), tl.int64)
    step = tl.arange(0, T)
    token = block * BLOCK + step - SHIFT
    column = tl.arange(0, D)
    real = column < HEAD_DIM
    summary = real
    exists = (step < BLOCK) & (token < length)
    inside = exists
    if SHIFT > 0:
        exists = exists & (token >= 0)
        begin = 0
        if STARTS:
            begin = tl.load(starts + batch * starts_stride_b + block, mask=block < blocks, other=0)
        inside = exists & (token >= begin * BLOCK) & (block < blocks)
        summary = real & (block < blocks)
    if VALID:
        inside = inside & (tl.load(valid + batch * v_stride_b + token, mask=inside, other=0) != 0)
    plane_block = (batch * heads + head) * blocks + block
    source = grad + plane_block * (POOLINGS * HEAD_DIM) + column
    places = place + plane_block * (2 * HEAD_DIM) + column
    total = tl.zeros([T, D], tl.float32)
    if MEAN >= 0:
        g = tl.load(source + MEAN * HEAD_DIM, mask=summary, other=0.0).to(tl.float32)
        count = tl.sum(inside.to(tl.int32), 0)
        total += tl.where(inside[:, None], (g / tl.maximum(count, 1))[None, :], 0.0)
    if MAX >= 0:
        g = tl.load(source + MAX * HEAD_DIM, mask=summary, other=0.0).to(tl.float32)
        first = tl.load(places, mask=summary, other=T).to(tl.int32)
        total += tl.where(step[:, None] == first[None, :], g[None, :], 0.0)
    if MIN >= 0:
        g = tl.load(source + MIN * HEAD_DIM, mask=summary, other=0.0).to(tl.float32)
        first = tl.load(places + HEAD_DIM, mask=summary, other=T).to(tl.int32)
        total += tl.where(step[:, None] == first[None, :], g[None, :], 0.0)
    shape = exists[:, None] & real[None, :]
    if ATTENTION >= 0:
        g = tl.load(source + ATTENTION * HEAD_DIM, mask=summary, other=0.0).to(tl.float32)
        u = tl.load(pool_query + head * HEAD_DIM + column, mask=real, other=0.0).to(tl.float32)
        tokens = x + batch * x_stride_b + tl.cast(head, tl.int64) * x_stride_h
        tile = tl.load(
            tokens + token.to(tl.int64)[:, None] * x_stride_n + column[None, :],
            mask=inside[:, None] & real[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        weight = _attention_weights(tile, u, inside)
        pull = tl.sum(tile * g[None, :], 1)
        pull = weight * (pull - tl.sum(weight * pull, 0))
        total += weight[:, None] * g[None, :] + pull[:, None] * u[None, :]
        tl.store(
            grad_pool + plane_block * HEAD_DIM + column, tl.sum(pull[:, None] * tile, 0),
            mask=summary,
        )  # fmt: skip
    if MORE:
        other = more + batch * more_stride_b + tl.cast(head, tl.int64) * more_stride_h
        total += tl.load(
            other + token.to(tl.int64)[:, None] * more_stride_n + column[None, :],
            mask=shape, other=0.0,
        ).to(tl.float32)  # fmt: skip
    target = grad_x + (batch * length + token.to(tl.int64)[:, None]) * (heads * HEAD_DIM)
    tl.store(
        target + head * HEAD_DIM + column[None, :], total.to(grad_x.dtype.element_ty), mask=shape
    )


def _constants(pooling: str, block_size: int, past: bool, head_dim: int) -> dict[str, int]:
    """The kernels' compile-time arguments: of each pooling its place in the output, or -1."""
    names = pooling.split(",")
    kinds = ("mean", "max", "min", "attention")
    return {
        "BLOCK": block_size,
        "T": triton.next_power_of_2(block_size),
        "D": triton.next_power_of_2(head_dim),
        "HEAD_DIM": head_dim,
        "POOLINGS": len(names),
        "SHIFT": block_size - 1 if past else 0,
        **{kind.upper(): names.index(kind) if kind in names else -1 for kind in kinds},
    }


def _per_sample(x: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """A tensor ``(1 or b, ...)`` and its step from sample to sample."""
    if x is None:
        return stand_in, 0
    return x.view(torch.uint8) if x.dtype == torch.bool else x, batch_stride(x)


def _empty(x: Tensor, pooling: str, block_size: int) -> Tensor:
    b, n, h, d = x.shape
    shape = (b, h, ceil_div(n, block_size), d * (pooling.count(",") + 1))
    return x.new_empty(shape, dtype=torch.float32)


# What is summarised: tokens, which of them count, pool query, summaries.
_Part = tuple[Tensor, Tensor | None, Tensor | None, Tensor]


def _launch(
    first: _Part, second: _Part | None, pooling: str, block_size: int, past: bool,
    starts: Tensor | None, place: Tensor | None,
) -> None:  # fmt: skip
    """Writes summaries and, for the gradient, where the extremes of ``first`` lie.

    ``past`` and ``starts`` concern ``first``.
    """
    parts = [first, second or first]
    x, valid, _, out = first
    batch, _, _, head_dim = x.shape
    programs = [summaries.shape[1] * summaries.shape[2] for *_, summaries in parts]
    if second is None:
        programs[1] = 0
    if batch == 0 or head_dim == 0 or sum(programs) == 0:
        return
    t = triton.next_power_of_2(block_size)
    even = all(tokens.shape[1] % block_size == 0 for tokens, *_ in parts)
    sizes = [
        (tokens.shape[1], summaries.shape[2], tokens.shape[2]) for tokens, *_, summaries in parts
    ]
    with on_device(x.device):
        summary_kernel[(sum(programs), batch)](
            *(value for tokens, *_ in parts for value in (tokens, *strides(tokens))),
            *(value for tokens, counts, *_ in parts for value in _per_sample(counts, tokens)),
            *(tokens if pool is None else pool for tokens, _, pool, _ in parts),
            *(summaries for *_, summaries in parts), out if place is None else place,
            *_per_sample(starts, x), *sizes[0], *sizes[1],
            **_constants(pooling, block_size, past, head_dim), VALID=valid is not None,
            PLACE=place is not None, FULL=valid is None and block_size == t and even and not past,
            PAIR=second is not None, STARTS=starts is not None, CHUNK=min(t, _TOKENS),
            num_warps=1, **overlap(x.device),
        )  # fmt: skip


@torch.library.custom_op(f"{NAMESPACE}::block_summaries", mutates_args=())
def summaries_op(
    x: Tensor, valid: Tensor | None, pool_query: Tensor | None, pooling: str, block_size: int,
    want_place: bool, past: bool, starts: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Summaries ``(b, h, i, s)`` in float32, and where extremes lie (empty unless wanted).

    Args:
        x: ``(b, n, h, d)``, last dimension contiguous.
        valid: ``(1 or b, n)`` booleans, contiguous: the tokens that count. None: all.
        pool_query: ``(h, d)`` contiguous, for ``"attention"``, or None.
        pooling: Names, joined by commas.
        block_size: Tokens per block.
        want_place: For the gradient: ``(b, h, i, 2, d)`` int16.
        past: Blocks end with the first token of the block that they stand for (``past_windows``).
        starts: With ``past``: ``(1 or b, i)`` int32, last dimension contiguous, the first block of
            each block's document. None: one document.
    """
    out, place = _empty_summaries(x, valid, pool_query, pooling, block_size, want_place)
    _launch(
        (x, valid, pool_query, out), None, pooling, block_size, past, starts,
        place if want_place else None,
    )  # fmt: skip
    return out, place


@summaries_op.register_fake
def _empty_summaries(
    x: Tensor, _valid: Any, _pool: Any, pooling: str, block_size: int, want_place: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    out = _empty(x, pooling, block_size)
    shape = (*out.shape[:3], 2, x.shape[3]) if want_place else (0,)
    return out, x.new_empty(shape, dtype=torch.int16)


@torch.library.custom_op(f"{NAMESPACE}::block_summaries_backward", mutates_args=())
def summaries_backward_op(
    grad: Tensor, place: Tensor, x: Tensor, valid: Tensor | None, pool_query: Tensor | None,
    pooling: str, block_size: int, past: bool, starts: Tensor | None, more: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the tokens, with ``more`` added, and of the pool query (empty without one).

    ``grad`` is contiguous, the last dimension of ``more`` too; the others as in the forward pass.
    """
    b, n, h, d = x.shape
    blocks, learned = grad.shape[2], pool_query is not None
    grad_x = x.new_empty(b, n, h, d)
    # Each block writes its share of the pool query's, so that the sum is deterministic.
    shares = x.new_zeros((b, h, blocks, d) if learned else 0, dtype=torch.float32)
    if grad_x.numel():
        sizes = _constants(pooling, block_size, past, d)
        extra = grad_x if more is None else more
        # The tokens behind the last window have a program of their own.
        programs = h * (blocks + 1 if past else blocks)
        with on_device(x.device):
            summary_grad_kernel[(programs, b)](
                grad, place, x, *strides(x), *_per_sample(valid, x),
                x if pool_query is None else pool_query, grad_x, shares if learned else grad_x,
                *_per_sample(starts, x), extra, *strides(extra), n, blocks, h, **sizes,
                VALID=valid is not None, STARTS=starts is not None, MORE=more is not None,
                # About 64 numbers a thread.
                num_warps=min(max(sizes["T"] * sizes["D"] // 2048, 1), 16),
            )  # fmt: skip
    if pool_query is None:
        return grad_x, x.new_empty(0)
    return grad_x, shares.sum((0, 2)).to(pool_query.dtype)


@summaries_backward_op.register_fake
def _(
    grad: Tensor, place: Tensor, x: Tensor, valid: Tensor | None, pool_query: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    pool = x.new_empty(0) if pool_query is None else torch.empty_like(pool_query)
    return x.new_empty(x.shape), pool


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, valid, pool_query, pooling, block_size, _, past, starts = inputs
    ctx.save_for_backward(output[1], x, valid, pool_query, starts)
    ctx.constants = pooling, block_size, past
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor | None]:
    place, x, valid, pool_query, starts = ctx.saved_tensors
    grad_x, grad_pool = summaries_backward_op(
        grad.contiguous(), place, x, valid, pool_query, *ctx.constants, starts, more
    )
    return grad_x, None if pool_query is None else grad_pool


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    grad_x, grad_pool = _gradients(ctx, grad, None)
    return grad_x, None, grad_pool, *(None,) * 5


summaries_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::block_summaries_of_both", mutates_args=())
def both_summaries_op(
    x: Tensor, y: Tensor, x_valid: Tensor | None, y_valid: Tensor | None, x_pool: Tensor | None,
    y_pool: Tensor | None, pooling: str, block_size: int, past: bool, starts: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`summaries_op` of two tensors in one launch; no gradient.

    Both or neither have ``valid``, and both or neither a pool query; dtype, batch and head_dim are
    equal. ``past`` and ``starts`` concern ``x``.
    """
    outs = _empty(x, pooling, block_size), _empty(y, pooling, block_size)
    _launch(
        (x, x_valid, x_pool, outs[0]), (y, y_valid, y_pool, outs[1]), pooling, block_size, past,
        starts, None,
    )  # fmt: skip
    return outs


@both_summaries_op.register_fake
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    pooling, block_size = rest[4:6]
    return _empty(x, pooling, block_size), _empty(y, pooling, block_size)


class PassedTokens(torch.autograd.Function):
    """Summaries, and the tokens for whoever reads them next.

    Attention and summaries read the same queries and keys. Autograd would write both gradients and
    add them in a third pass; here attention's gradient arrives before the summaries' kernel runs,
    which adds it as it writes. An operator of ``torch.library`` may not return its input, hence a
    function of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, valid: Tensor | None, pool_query: Tensor | None, pooling: str,
        block_size: int, past: bool, starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Summaries ``(b, h, i, s)`` as of :func:`summaries_op`, and ``x`` itself."""
        extremes = "max" in pooling or "min" in pooling
        inputs = x, valid, pool_query, pooling, block_size, extremes, past, starts
        output = summaries_op(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0], x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, more: Tensor | None) -> tuple[Any, ...]:
        """The sum of both gradients of the tokens, and the pool query's."""
        if grad is None:
            return more, *(None,) * 6
        grad_x, grad_pool = _gradients(ctx, grad, None if more is None else rows_of(more))
        return grad_x, None, grad_pool, *(None,) * 4
