"""Kernels that summarise blocks of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_selection.triton_kernels.shared import VARYING, follow


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
