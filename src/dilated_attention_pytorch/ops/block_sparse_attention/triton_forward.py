"""The forward pass of block-sparse attention in Triton, and its operator with its gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.mask import document_bounds
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments
from dilated_attention_pytorch.ops.block_sparse_attention.triton_backward import backward_op
from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import (
    Call,
    LaunchConfig,
    finite_part,
    forward_config,
    load_rows,
    sources,
    store_rows,
    unmasked_tiles,
    visible,
)
from dilated_attention_pytorch.ops.operators import (
    NAMESPACE,
    Apply,
    differentiable,
    empty_results,
    rows_of,
)
from dilated_attention_pytorch.ops.triton_device import LN2, LOG2E, on_device, strides


@triton.jit
def _forward_tile(
    acc, m_i, l_i, q, key_source, value_source,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    batch, kv_head, start, kv_len, bias, scale2, row, key_limit, offset, documents, q_len,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over ``COLUMNS`` keys from ``start``."""
    k = load_rows(
        key_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    v = load_rows(
        value_source, v_stride_b, v_stride_h, v_stride_n, batch, kv_head, start, kv_len,
        1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
    )  # fmt: skip
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        column = start + tl.arange(0, COLUMNS)
        if BIAS:
            # Nobody reads such a tile.
            key_limit = tl.where(bias == float("-inf"), 0, key_limit)
        ok = visible(
            row[:, None], column[None, :], batch, key_limit, offset, documents, q_len,
            CAUSAL, DOCUMENTS,
        )  # fmt: skip
        # After the factor, which may be 0: -inf * 0 is NaN.
        s = tl.where(ok, s * scale2 + bias, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale2 + bias)
    # A row that has seen nothing yet keeps -inf; 0 instead avoids -inf - -inf.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - base[:, None]) if MASKED else tl.exp2(s * scale2 + (bias - base)[:, None])
    alpha = tl.exp2(m_i - base)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if MASKED:
        # 0, or NaN for a token with a number that is not finite: for those alone that read it.
        special = tl.sum((v - v).to(tl.float32), 1)
        # Not by the weight: one that underflows to 0 is of a token that is read all the same.
        p = tl.where(s > float("-inf"), p + special[None, :], p)
        v = finite_part(v)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_new, l_i


@triton.jit
def forward_kernel(
    q_source, q_stride_b, q_stride_h, q_stride_n,
    k_source, k_stride_b, k_stride_h, k_stride_n,
    v_source, v_stride_b, v_stride_h, v_stride_n,
    out, o_stride_b, o_stride_h, o_stride_n,
    lse,
    counts, c_stride_b, c_stride_p, c_stride_i,
    indices, i_stride_b, i_stride_p, i_stride_i,
    block_bias, b_stride_b, b_stride_p, b_stride_i,
    key_lengths, offsets, documents, bounds,
    q_len, kv_len, offset, scale2, num_heads, query_tiles,
    GROUP: tl.constexpr, HEADS_PER_PATTERN: tl.constexpr, PACK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
    DOCUMENTS: tl.constexpr, EVEN_KEYS: tl.constexpr,
    TMA_Q: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax attention of ``ROWS`` queries of ``PACK`` heads over the kept tiles of their row.

    ::

          j  0 1 2 3 4 5
        i 3  █ . █ ▒ . .     █ whole, no mask: entries [low, full) of the row's ascending list
        i 4  █ . . █ ▒ .     ▒ cut by a mask: its other entries
        i 5  . █ . . █ ▒     . not kept: never read

    Over the tiles, with the running maximum m_i, sum l_i and accumulator acc of each row::

        s = scale log2(e) q kᵀ + bias log2(e)
        m_new = max(m_i, max_k s),  p = 2^(s - m_new),  alpha = 2^(m_i - m_new)
        l_i = alpha l_i + Σ_k p,    acc = alpha acc + p v,    m_i = m_new

    At the end ``out = acc / l_i`` and ``lse = (m_i + log2(l_i)) ln(2)``; a row that reads nothing
    gets 0 and -inf.
    """
    # Under a causal mask the last rows hold the most tiles: they start first.
    query_tile = query_tiles - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    head = tl.program_id(1) * PACK
    batch = tl.program_id(2)
    kv_head = head // GROUP
    shared = head // HEADS_PER_PATTERN
    first = query_tile * ROWS
    block = first // BLOCK_Q
    batch64 = tl.cast(batch, tl.int64)
    shared64 = tl.cast(shared, tl.int64)
    block64 = tl.cast(block, tl.int64)
    count = tl.load(counts + batch64 * c_stride_b + shared64 * c_stride_p + block64 * c_stride_i)
    entries = indices + batch64 * i_stride_b + shared64 * i_stride_p + block64 * i_stride_i
    biases = block_bias
    if BIAS:
        biases += batch64 * b_stride_b + shared64 * b_stride_p + block64 * b_stride_i
    if OFFSETS:
        offset = tl.load(offsets + batch).to(tl.int32)
    key_limit = kv_len
    if LENGTHS:
        key_limit = tl.minimum(tl.load(key_lengths + batch).to(tl.int32), kv_len)
    low = 0
    full = count
    if CAUSAL or LENGTHS or DOCUMENTS or BIAS or not EVEN_KEYS:
        low, full = unmasked_tiles(
            entries, biases, count, first, key_limit, offset, documents, bounds, batch, q_len,
            BLOCK_K, ROWS, CAUSAL, DOCUMENTS, BIAS,
        )  # fmt: skip
    q = load_rows(
        q_source, q_stride_b, q_stride_h, q_stride_n, batch, head, first, q_len,
        PACK, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    row = first + tl.arange(0, PACK * ROWS) % ROWS
    m_i = tl.full([PACK * ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([PACK * ROWS], tl.float32)
    acc = tl.zeros([PACK * ROWS, D], tl.float32)
    VISITS: tl.constexpr = BLOCK_K // COLUMNS
    # The list entry of the next step is fetched one step ahead: its address depends on nothing.
    upcoming = tl.load(entries + low, mask=low < full, other=0)
    for step in tl.range(low * VISITS, full * VISITS, num_stages=STAGES):
        slot = step // VISITS
        start = upcoming * BLOCK_K + (step % VISITS) * COLUMNS
        following = (step + 1) // VISITS
        upcoming = tl.load(entries + following, mask=following < full, other=0)
        bias = 0.0
        if BIAS:
            bias = tl.load(biases + slot) * LOG2E
        acc, m_i, l_i = _forward_tile(
            acc, m_i, l_i, q, k_source, v_source,
            k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
            batch, kv_head, start, kv_len, bias, scale2,
            row, key_limit, offset, documents, q_len,
            D, HEAD_DIM, COLUMNS, CAUSAL, DOCUMENTS, BIAS, False, TMA, UPCAST, PRECISION,
        )  # fmt: skip
    if CAUSAL or LENGTHS or DOCUMENTS or BIAS or not EVEN_KEYS:
        for step in tl.range(0, (count - (full - low)) * VISITS, num_stages=1):
            slot = step // VISITS
            slot = tl.where(slot < low, slot, slot + full - low)
            start = tl.load(entries + slot) * BLOCK_K + (step % VISITS) * COLUMNS
            bias = 0.0
            if BIAS:
                bias = tl.load(biases + slot) * LOG2E
            acc, m_i, l_i = _forward_tile(
                acc, m_i, l_i, q, k_source, v_source,
                k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
                batch, kv_head, start, kv_len, bias, scale2,
                row, key_limit, offset, documents, q_len,
                D, HEAD_DIM, COLUMNS, CAUSAL, DOCUMENTS, BIAS, True, TMA, UPCAST, PRECISION,
            )  # fmt: skip
    empty = m_i == float("-inf")
    l_i = tl.where(empty, 1.0, l_i)
    acc = acc / l_i[:, None]
    store_rows(
        out, o_stride_b, o_stride_h, o_stride_n, batch, head, first, q_len, acc,
        PACK, ROWS, D, HEAD_DIM,
    )  # fmt: skip
    of_row = head + tl.arange(0, PACK * ROWS) // ROWS
    place = (batch64 * num_heads + of_row) * q_len + row
    natural = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    # An infinite logit takes all the weight: not inf - inf.
    natural = tl.where(m_i == float("inf"), m_i, natural)
    tl.store(lse + place, natural, mask=row < q_len)


def launch_forward(
    call: Call, out: Tensor, lse: Tensor, config: LaunchConfig | None = None
) -> None:
    """Writes the output ``(b, n, h, d)`` and the lse ``(b, h, n)``, both preallocated."""
    if call.empty:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    config = config or forward_config(call.tile())
    batch, q_len, num_heads, _ = call.query.shape
    pack = call.tile().pack(config.rows)
    tiles = triton.cdiv(q_len, config.rows)
    (query,), tma_q = sources((call.query,), pack, config.rows, call)
    (key, value), tma = sources((call.key, call.value), 1, config.columns, call)
    with on_device(call.query.device):
        forward_kernel[(tiles, num_heads // pack, batch)](
            *query, *key, *value, out, *strides(out), lse,
            call.counts, *call.counts.stride(),
            call.indices, *call.indices.stride()[:3],
            *call.mask_arguments(),
            q_len, call.key.shape[1], call.offset, call.scale * LOG2E.value,
            num_heads, tiles,
            **call.constants(), PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
            TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
            **config.options(),
        )  # fmt: skip


def triton_attention(args: Arguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_attention` defines them."""
    pattern, mask = args.pattern, args.mask
    query, scale = args.query, args.scale
    if scale < 0:
        # The kernels take the maximum of the raw logits, which needs a positive factor.
        query, scale = -query, -scale
    bounds, key_lengths = None, mask.key_lengths
    if mask.document_ids is not None:
        bounds = torch.stack(document_bounds(mask.document_ids), 1).int()
        # Padding follows the last document.
        key_lengths = (mask.document_ids >= 0).sum(-1)
    starts, slots = args.transpose()
    per_sample = isinstance(mask.query_offset, Tensor)
    out, lse = _attend(
        rows_of(query), rows_of(args.key), rows_of(args.value),
        pattern.kv_num_blocks, rows_of(pattern.kv_indices),
        None if args.block_bias is None else rows_of(args.block_bias), args.mass_probe,
        starts, slots, key_lengths, mask.query_offset if per_sample else None,
        mask.document_ids, bounds, *pattern.block_size, mask.causal,
        0 if per_sample else mask.query_offset, scale,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_forward", mutates_args=())
def forward_op(
    query: Tensor, key: Tensor, value: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor,
    block_bias: Tensor | None, mass_probe: Tensor | None, starts: Tensor | None,
    slots: Tensor | None, key_lengths: Tensor | None, query_offset: Tensor | None,
    document_ids: Tensor | None, bounds: Tensor | None, block_q: int, block_k: int, causal: bool,
    offset: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse; ``mass_probe``, ``starts`` and ``slots`` matter to the gradient alone."""
    call = Call(
        query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
        document_ids, bounds, block_q, block_k, causal, offset, scale,
    )  # fmt: skip
    out, lse = empty_results(query)
    launch_forward(call, out, lse)
    return out, lse


forward_op.register_fake(empty_results)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (
        query, key, value, counts, indices, bias, probe, starts, slots, lengths, offsets,
        documents, bounds, *constants,
    ) = inputs  # fmt: skip
    ctx.save_for_backward(
        *output, query, key, value, counts, indices, bias, starts, slots, lengths, offsets,
        documents, bounds,
    )  # fmt: skip
    ctx.constants = constants
    ctx.probe_dtype = None if probe is None else probe.dtype
    ctx.set_materialize_grads(False)


def _backward(
    run: Apply, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    out, lse, *saved = ctx.saved_tensors
    want_bias, want_mass = ctx.needs_input_grad[5], ctx.needs_input_grad[6]
    grad_out = torch.zeros_like(out) if grad_out is None else rows_of(grad_out.to(out.dtype))
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    dq, dk, dv, dbias, mass = run(
        grad_out, grad_lse, out, lse, *saved, *ctx.constants, want_bias, want_mass
    )
    of_bias = dbias if want_bias else None
    of_probe = mass.to(ctx.probe_dtype) if want_mass else None
    return dq, dk, dv, None, None, of_bias, of_probe, *(None,) * 11


_attend = differentiable(forward_op, backward_op, _setup_context, _backward)
