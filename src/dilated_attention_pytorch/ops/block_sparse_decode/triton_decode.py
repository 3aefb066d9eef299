"""Block-sparse decoding in Triton: kernels, launch and operator.

A list's kept blocks, one after the other, are a sequence of ``count * BLOCK`` *columns*. The first
kernel splits the columns over programs; each does an online softmax over its part for the query
heads that share keys and list, with the running maximum m_i, sum l_i and accumulator acc of each::

    s = scale log2(e) q kᵀ,  p = 2^(s - max(m_i, s)),  alpha = 2^(m_i - max(m_i, s))
    l_i = alpha l_i + Σ p,   acc = alpha acc + p v

The second adds the parts of a row up in a fixed order, weighted by their lse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_decode.arguments import DecodeArguments
from dilated_attention_pytorch.ops.operators import NAMESPACE, empty_results, rows_of
from dilated_attention_pytorch.ops.triton_device import (
    INTERPRETED,
    LN2,
    LOG2E,
    PRECISE,
    on_device,
    strides,
)

# Programs per multiprocessor that the split aims at.
_WAVES = 2
_MOST_SPLITS = 64


@triton.jit
def split_kernel(
    query, q_stride_b, q_stride_h, q_stride_n,
    key, k_stride_b, k_stride_h, k_stride_m,
    value, v_stride_b, v_stride_h, v_stride_m,
    partial, partial_lse,
    counts, c_stride_b, c_stride_p, c_stride_n,
    indices, i_stride_b, i_stride_p, i_stride_n,
    block_bias, b_stride_b, b_stride_p, b_stride_n,
    lengths, starts,
    new, capacity, width, num_heads, scale2, splits,
    GROUP: tl.constexpr, HEADS_PER_LIST: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    BIAS: tl.constexpr, STARTS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Output and lse of one split: ``(b, h, n, splits, d)`` and ``(b, h, n, splits)``."""
    split = tl.program_id(0)
    first_head = tl.program_id(1) * PACK
    batch = tl.program_id(2) // new
    token = tl.program_id(2) % new
    batch64 = batch.to(tl.int64)
    token64 = token.to(tl.int64)
    shared64 = (first_head // HEADS_PER_LIST).to(tl.int64)
    kv_head64 = (first_head // GROUP).to(tl.int64)
    count = tl.load(counts + batch64 * c_stride_b + shared64 * c_stride_p + token64 * c_stride_n)
    count = tl.minimum(count, width)
    entries = indices + batch64 * i_stride_b + shared64 * i_stride_p + token64 * i_stride_n
    if BIAS:
        biases = block_bias + batch64 * b_stride_b + shared64 * b_stride_p + token64 * b_stride_n
    start = 0
    if STARTS:
        start = tl.minimum(tl.maximum(tl.load(starts + batch), 0), capacity).to(tl.int32)
    # The query sees the tokens up to its own.
    length = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), capacity).to(tl.int32)
    limit = length - new + token + 1
    limit = tl.minimum(limit, capacity - start)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    head = first_head + row
    inside = (row < PACK)[:, None] & (dim < HEAD_DIM)[None, :]
    place = batch64 * q_stride_b + token64 * q_stride_n + head.to(tl.int64) * q_stride_h
    q = tl.load(query + place[:, None] + dim[None, :], mask=inside, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    keys = key + batch64 * k_stride_b + kv_head64 * k_stride_h + dim[None, :]
    values = value + batch64 * v_stride_b + kv_head64 * v_stride_h + dim[None, :]

    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    tiles = tl.cdiv(count * BLOCK, COLUMNS)
    first = split * tiles // splits
    last = (split + 1) * tiles // splits
    lane = tl.arange(0, COLUMNS)
    # Block numbers are fetched one step ahead: an address that waits for another load takes the
    # place of a tile in flight.
    slot = (first * COLUMNS + lane) // BLOCK
    upcoming = tl.load(entries + slot, mask=slot < count, other=-1)
    for tile in tl.range(first, last, num_stages=STAGES):
        column = tile * COLUMNS + lane
        slot = column // BLOCK
        # Numbers of no block are out of sight, whatever they are.
        named = (upcoming >= 0) & (upcoming <= limit // BLOCK)
        position = tl.where(named, upcoming * BLOCK + column % BLOCK, limit)
        following = (column + COLUMNS) // BLOCK
        upcoming = tl.load(entries + following, mask=following < count, other=-1)
        visible = position < limit
        if BIAS:
            bias = tl.load(biases + slot, mask=slot < count, other=0.0) * LOG2E
            visible = visible & (bias != float("-inf"))
        # What is not visible is never read: it may be unwritten, and 0 * NaN is NaN.
        read = visible[:, None] & (dim < HEAD_DIM)[None, :]
        cached = (position + start).to(tl.int64)[:, None]
        k = tl.load(keys + cached * k_stride_m, mask=read, other=0.0)
        v = tl.load(values + cached * v_stride_m, mask=read, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if BIAS:
            s += bias[None, :]
        s = tl.where(visible[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # A row that has seen nothing yet keeps -inf; 0 instead avoids -inf - -inf.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m_i - base)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    empty = m_i == float("-inf")
    l_i = tl.where(empty, 1.0, l_i)
    cell = ((batch64 * num_heads + head) * new + token) * splits + split
    tl.store(partial + (cell * HEAD_DIM)[:, None] + dim[None, :], acc / l_i[:, None], mask=inside)
    tl.store(
        partial_lse + cell,
        tl.where(empty | (m_i == float("inf")), m_i, m_i + tl.log2(l_i)),
        mask=row < PACK,
    )


@triton.jit
def merge_kernel(
    partial, partial_lse, out, o_stride_b, o_stride_h, o_stride_n, lse,
    new, num_heads, splits,
    SPLITS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of one query row, weighted by their lse (in base 2)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    batch64 = tl.program_id(2).to(tl.int64)
    cell = (batch64 * num_heads + head) * new + token
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, D)
    part = tl.load(partial_lse + cell * splits + split, mask=split < splits, other=float("-inf"))
    m_i = tl.max(part, 0)
    empty = m_i == float("-inf")
    weight = tl.exp2(part - tl.where(empty, 0.0, m_i))
    l_i = tl.where(empty, 1.0, tl.sum(weight, 0))
    inside = (split < splits)[:, None] & (dim < HEAD_DIM)[None, :]
    place = ((cell * splits + split) * HEAD_DIM)[:, None] + dim[None, :]
    acc = tl.sum(tl.load(partial + place, mask=inside, other=0.0) * weight[:, None], 0)
    acc = acc / l_i
    target = out + batch64 * o_stride_b + head.to(tl.int64) * o_stride_h
    target += token.to(tl.int64) * o_stride_n
    tl.store(target + dim, acc.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    natural = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    # An infinite logit takes all the weight: not inf - inf.
    tl.store(lse + cell, tl.where(m_i == float("inf"), m_i, natural))


@dataclass(frozen=True)
class LaunchConfig:
    """How the split kernel is launched.

    Attributes:
        columns: Key tokens of a tile.
        num_warps: Warps of a program.
        num_stages: Tiles in flight from memory.
        splits: Programs that share a list; None: enough to fill the device.
    """

    columns: int
    num_warps: int
    num_stages: int
    splits: int | None = None


def launch_config(dtype: torch.dtype, padded_head_dim: int) -> LaunchConfig:
    """The launch of the split kernel."""
    if dtype == torch.float32:
        return LaunchConfig(32 if padded_head_dim <= 128 else 16, 4, 2)
    return LaunchConfig(64 if padded_head_dim <= 128 else 32, 4, 3)


def launch_decode(
    args: DecodeArguments, out: Tensor, lse: Tensor, config: LaunchConfig | None = None
) -> None:
    """Writes the output ``(b, n, h, d)`` and the lse ``(b, h, n)``, both preallocated.

    The last dimension of tensors is contiguous; every query has a list of its own.
    """
    if 0 in (out.numel(), args.key.numel(), args.indices.numel()):
        out.zero_()
        lse.fill_(-torch.inf)
        return
    batch, new, heads, dim = args.query.shape
    d = max(16, triton.next_power_of_2(dim))
    config = config or launch_config(args.query.dtype, d)
    # Query heads that share keys and list: all of them are rows of one tile.
    pack = min(heads // args.key.shape[2], heads // args.counts.shape[1])
    packs = heads // pack
    splits = config.splits or _num_splits(args, packs * batch * new, config.columns)
    partial = args.query.new_empty(batch, heads, new, splits, dim, dtype=torch.float32)
    partial_lse = args.query.new_empty(batch, heads, new, splits, dtype=torch.float32)
    bias = args.block_bias
    full_precision = torch.get_float32_matmul_precision() == "highest"
    with on_device(args.query.device):
        split_kernel[(splits, packs, batch * new)](
            args.query, *strides(args.query), args.key, *strides(args.key),
            args.value, *strides(args.value), partial, partial_lse,
            args.counts, *args.counts.stride(), args.indices, *args.indices.stride()[:3],
            *((args.counts, 0, 0, 0) if bias is None else (bias, *bias.stride()[:3])),
            args.lengths, args.lengths if args.starts is None else args.starts,
            new, args.key.shape[1], args.indices.shape[3], heads, args.scale * LOG2E.value, splits,
            GROUP=heads // args.key.shape[2], HEADS_PER_LIST=heads // args.counts.shape[1],
            PACK=pack, ROWS=max(16, triton.next_power_of_2(pack)),
            BLOCK=args.block_size, COLUMNS=config.columns, D=d, HEAD_DIM=dim,
            BIAS=bias is not None, STARTS=args.starts is not None, UPCAST=INTERPRETED,
            PRECISION=PRECISE.value if full_precision else "tf32", STAGES=config.num_stages,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        merge_kernel[(new, heads, batch)](
            partial, partial_lse, out, *strides(out), lse, new, heads, splits,
            SPLITS=triton.next_power_of_2(splits), D=d, HEAD_DIM=dim, num_warps=4,
        )  # fmt: skip


def _num_splits(args: DecodeArguments, programs: int, columns: int) -> int:
    """Splits that fill the device, none without a tile when lists are full."""
    tiles = triton.cdiv(args.indices.shape[-1] * args.block_size, columns)
    wanted = triton.cdiv(_WAVES * _multiprocessors(args.query.device), max(programs, 1))
    return max(1, min(wanted, tiles, _MOST_SPLITS))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def triton_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_decode` defines them."""
    n, bias = args.query.shape[1], args.block_bias
    out, lse = decode_op(
        rows_of(args.query), rows_of(args.key), rows_of(args.value),
        args.counts.expand(-1, -1, n), rows_of(args.indices).expand(-1, -1, n, -1),
        None if bias is None else rows_of(bias).expand(-1, -1, n, -1),
        args.lengths, args.starts, args.block_size, args.scale,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_decode", mutates_args=())
def decode_op(
    query: Tensor, key: Tensor, value: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor,
    block_bias: Tensor | None, lengths: Tensor, starts: Tensor | None, block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse."""
    args = DecodeArguments(
        query, key, value, kv_num_blocks, kv_indices, lengths, starts, block_bias, block_size,
        scale,
    )  # fmt: skip
    out, lse = empty_results(query)
    launch_decode(args, out, lse)
    return out, lse


decode_op.register_fake(empty_results)
