"""What each tile tells the selector: its mass and the gradient of its bias; Triton kernels.

With ``w_n = ‖dO_n‖`` of each row n (0 where it reads nothing) the mass of tile (i, j) is

    Σ_n w_n Σ_(m in j) P_nm / Σ_n w_n

over the rows of block i and the heads that share the pattern; the gradient of its bias is
``Σ_n Σ_(m in j) dS_nm``. Programs store what they add up of a tile in parts, one plane per visit;
``collect_kernel`` adds these up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import (
    Call,
    LaunchConfig,
    count_below,
    load_rows,
    mass_config,
    sources,
)
from dilated_attention_pytorch.ops.triton_device import LOG2E, on_device


@triton.jit
def store_parts(target, place, per_row, PARTS: tl.constexpr):
    """Stores the sum over a tile's rows, as one part per warp where every warp has its own rows.

    Warps that add up one number wait for each other. The addresses run along the lanes, of which
    the first stores: so the layout gives every warp its own part, and handing the parts over takes
    neither shared memory nor a barrier.
    """
    if PARTS == 1:
        tl.store(target + place, tl.sum(per_row, 0))
    else:
        parts = tl.sum(tl.reshape(per_row, [PARTS, per_row.shape[0] // PARTS]), 1)
        lane = tl.arange(0, 32)[None, :]
        spread = tl.broadcast_to(parts[:, None], [PARTS, 32])
        tl.store(target + place * PARTS + tl.arange(0, PARTS)[:, None] + lane, spread, lane == 0)


@triton.jit
def store_by_products(
    mass, grad_bias, place, p, ds, weight,
    MASS: tl.constexpr, GRAD_BIAS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What a visited tile says about its score."""
    if MASS:
        store_parts(mass, place, tl.sum(p, 1) * weight, PARTS)
    if GRAD_BIAS:
        store_parts(grad_bias, place, tl.sum(ds, 1), PARTS)


@triton.jit
def mass_kernel(
    q_source, q_stride_b, q_stride_h, q_stride_n,
    k_source, k_stride_b, k_stride_h, k_stride_n,
    g_source, g_stride_b, g_stride_h, g_stride_n,
    lse, norm, mass,
    counts, c_stride_b, c_stride_p, c_stride_i,
    indices, i_stride_b, i_stride_p, i_stride_i,
    q_len, kv_len, scale2, num_heads, query_tiles, query_blocks, width,
    GROUP: tl.constexpr, HEADS_PER_PATTERN: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, PARTS: tl.constexpr, TMA_Q: tl.constexpr, TMA: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mass of the tiles of some rows of one head, one product each, and the rows' gradient norms.

    For whole blocks, as many queries as keys where ``CAUSAL``, and no other mask.
    """
    query_tile = query_tiles - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    shared = head // HEADS_PER_PATTERN
    first = query_tile * ROWS
    block = first // BLOCK
    batch64 = tl.cast(batch, tl.int64)
    shared64 = tl.cast(shared, tl.int64)
    block64 = tl.cast(block, tl.int64)
    count = tl.load(counts + batch64 * c_stride_b + shared64 * c_stride_p + block64 * c_stride_i)
    entries = indices + batch64 * i_stride_b + shared64 * i_stride_p + block64 * i_stride_i
    full = count
    if CAUSAL:
        full = count_below(entries, count, 1, 1, block)
    g = load_rows(
        g_source, g_stride_b, g_stride_h, g_stride_n, batch, head, first, q_len,
        1, ROWS, D, HEAD_DIM, TMA_Q, True,
    )  # fmt: skip
    row = first + tl.arange(0, ROWS)
    place = (batch64 * num_heads + head) * q_len + row
    log_sum = tl.load(lse + place)
    # Whatever gradient arrives at a row that reads nothing.
    weight = tl.where(log_sum == float("-inf"), 0.0, tl.sqrt(tl.sum(g * g, 1)))
    tl.store(norm + place, weight)
    # +inf makes exp2(s - lse) zero: rows that read nothing cost no mask.
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2E)
    q = load_rows(
        q_source, q_stride_b, q_stride_h, q_stride_n, batch, head, first, q_len,
        1, ROWS, D, HEAD_DIM, TMA_Q, UPCAST,
    )  # fmt: skip
    VISITS: tl.constexpr = BLOCK // COLUMNS
    plane = (batch64 * num_heads + head) * (BLOCK // ROWS) + first % BLOCK // ROWS
    cells = tl.cast(query_blocks, tl.int64) * width
    own = plane * VISITS * cells + block64 * width
    kv_head = head // GROUP
    upcoming = tl.load(entries, mask=full > 0, other=0)
    for step in tl.range(0, full * VISITS, num_stages=STAGES):
        slot = step // VISITS
        start = upcoming * BLOCK + (step % VISITS) * COLUMNS
        following = (step + 1) // VISITS
        upcoming = tl.load(entries + following, mask=following < full, other=0)
        k = load_rows(
            k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
            1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(s * scale2 - log_sum[:, None])
        store_parts(mass, own + step % VISITS * cells + slot, tl.sum(p, 1) * weight, PARTS)
    if CAUSAL:
        for step in tl.range(full * VISITS, count * VISITS, num_stages=1):
            slot = step // VISITS
            start = tl.load(entries + slot) * BLOCK + (step % VISITS) * COLUMNS
            k = load_rows(
                k_source, k_stride_b, k_stride_h, k_stride_n, batch, kv_head, start, kv_len,
                1, COLUMNS, D, HEAD_DIM, TMA, UPCAST,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            seen = start + tl.arange(0, COLUMNS)[None, :] <= row[:, None]
            p = tl.where(seen, tl.exp2(s * scale2 - log_sum[:, None]), 0.0)
            store_parts(mass, own + step % VISITS * cells + slot, tl.sum(p, 1) * weight, PARTS)


@triton.jit
def collect_kernel(
    parts, norm, target, counts, c_stride_b, c_stride_p, c_stride_i,
    pattern_heads, num_heads, query_blocks, width, planes, q_len, padded_len,
    HEADS_PER_PATTERN: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
    COLUMN_VISITS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of one row of tiles; with ``SHARE`` relative to its gradient norms."""
    block = tl.program_id(0)
    batch = tl.program_id(1) // pattern_heads
    shared = tl.program_id(1) % pattern_heads
    count = tl.load(
        counts + tl.cast(batch, tl.int64) * c_stride_b + tl.cast(shared, tl.int64) * c_stride_p
        + tl.cast(block, tl.int64) * c_stride_i
    )  # fmt: skip
    total = 1.0
    if SHARE:
        lane = tl.arange(0, BLOCK_Q)
        first = tl.cast(batch, tl.int64) * num_heads + shared * HEADS_PER_PATTERN
        norms = tl.zeros([BLOCK_Q], tl.float32)
        for head in range(HEADS_PER_PATTERN):
            row = block * BLOCK_Q + lane
            place = (first + head) * padded_len + row
            norms += tl.load(norm + place, mask=row < padded_len, other=0.0)
        # The smallest normal number: a row without gradient has no mass.
        total = tl.maximum(tl.sum(norms, 0), 1.1754943508222875e-38)
    own = tl.cast(tl.program_id(1), tl.int64)
    part = tl.arange(0, PARTS)
    for start in range(0, width, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        # Entries past the count were never written.
        used = (slot < count)[:, None] & (part < PARTS)[None, :]
        found = tl.zeros([SLOTS, PARTS], tl.float32)
        for plane in range(planes):
            # No program works on rows past the end.
            first_row = block * BLOCK_Q + plane // COLUMN_VISITS % (BLOCK_Q // ROWS) * ROWS
            cell = ((own * planes + plane) * query_blocks + block) * width + slot
            found += tl.load(
                parts + cell[:, None] * PARTS + part[None, :],
                mask=used & (first_row < q_len),
                other=0.0,
            )
        cell = (own * query_blocks + block) * width + slot
        tl.store(target + cell, tl.sum(found, 1) / total, mask=slot < width)


def parts_of(config: LaunchConfig, pack: int) -> int:
    """Parts in which a program stores the sum over a tile of ``pack`` heads."""
    # Elsewhere warps divide the columns, so that none has the sum of its rows.
    own_rows = config.num_warps % 4 == 0 and pack * config.rows == 16 * config.num_warps
    return config.num_warps if own_rows else 1


def empty_parts(call: Call, config: LaunchConfig, pack: int) -> Tensor:
    """Room ``(b, planes, i, k, parts)`` for what programs of ``pack`` heads add up of each tile.

    Entries past a row's count stay unwritten.
    """
    visits = (call.block_q // config.rows) * (call.block_k // config.columns)
    batch, _, num_heads, _ = call.query.shape
    shape = (batch, num_heads // pack * visits, *call.indices.shape[2:], parts_of(config, pack))
    return call.query.new_empty(shape, dtype=torch.float32)


def collect(
    call: Call, config: LaunchConfig, parts: Tensor, norm: Tensor, target: Tensor, *, share: bool
) -> None:
    """Adds up the parts; with ``share`` relative to the rows' gradient norms ``(b, h, rows)``."""
    batch, heads, blocks, width = call.indices.shape
    if target.numel() == 0:
        return
    with on_device(norm.device):
        collect_kernel[(blocks, batch * heads)](
            parts, norm, target, call.counts, *call.counts.stride(),
            heads, norm.shape[1], blocks, width, parts.shape[1] // heads,
            call.query.shape[1], norm.shape[2],
            HEADS_PER_PATTERN=call.heads_per_pattern, BLOCK_Q=call.block_q,
            ROWS=config.rows, COLUMN_VISITS=call.block_k // config.columns,
            PARTS=parts.shape[4], SLOTS=min(max(triton.next_power_of_2(width), 16), 64),
            SHARE=share, num_warps=1,
        )  # fmt: skip


def launch_mass(call: Call, lse: Tensor, grad_out: Tensor, mass: Tensor) -> None:
    """Writes the tile mass alone, one product per tile.

    Args:
        call: As in the forward pass: whole blocks, no mask but a causal one of equal lengths.
        lse: Its lse, contiguous.
        grad_out: Gradient of the output; last dimension contiguous.
        mass: ``(b, p, i, k)`` float32, contiguous.
    """
    batch, q_len, num_heads, _ = call.query.shape
    if mass.numel() == 0:
        return
    config = mass_config(call.tile())
    tiles = q_len // config.rows
    parts = empty_parts(call, config, 1)
    norm = lse.new_empty(batch, num_heads, q_len)
    (query, gradient), tma_q = sources((call.query, grad_out), 1, config.rows, call)
    (key,), tma = sources((call.key,), 1, config.columns, call)
    constants = call.constants()
    with on_device(call.query.device):
        mass_kernel[(tiles, num_heads, batch)](
            *query, *key, *gradient, lse, norm, parts,
            call.counts, *call.counts.stride(), call.indices, *call.indices.stride()[:3],
            q_len, call.key.shape[1], call.scale * LOG2E.value, num_heads, tiles,
            *call.indices.shape[2:],
            **{name: constants[name] for name in (
                "GROUP", "HEADS_PER_PATTERN", "D", "HEAD_DIM", "CAUSAL", "UPCAST", "PRECISION",
            )},
            BLOCK=call.block_q, ROWS=config.rows, COLUMNS=config.columns,
            PARTS=parts_of(config, 1), TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
            **config.options(),
        )  # fmt: skip
    collect(call, config, parts, norm, mass, share=True)
