"""The Triton kernel of :func:`append_tokens` and its operator."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.ops.operators import NAMESPACE
from dilated_attention_pytorch.ops.triton_device import on_device


@triton.jit
def append_kernel(
    queries, keys, lengths, starts,
    query, q_stride_b, q_stride_n, q_stride_h, q_stride_d,
    key, k_stride_b, k_stride_n, k_stride_h, k_stride_d,
    new, ring, query_size, key_size,
    DIM: tl.constexpr, CACHED: tl.constexpr, STARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per sample: nobody else reads the length that it changes."""
    batch = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + batch)
    first = length * 0
    if CACHED:
        first = length
        if STARTS:
            first += tl.load(starts + batch)
    lane = tl.arange(0, CHUNK)
    for token in range(new):
        slot = batch * ring + (length + token) % ring
        for chunk in range(0, query_size, CHUNK):
            place = chunk + lane
            inside = place < query_size
            source = query + batch * q_stride_b + token * q_stride_n
            source += (place // DIM).to(tl.int64) * q_stride_h + place % DIM * q_stride_d
            x = tl.load(source, mask=inside, other=0.0)
            tl.store(queries + slot * query_size + place, x, mask=inside)
        for chunk in range(0, key_size, CHUNK):
            place = chunk + lane
            inside = place < key_size
            source = key + batch * k_stride_b + (first + token) * k_stride_n
            source += (place // DIM).to(tl.int64) * k_stride_h + place % DIM * k_stride_d
            x = tl.load(source, mask=inside, other=0.0)
            tl.store(keys + slot * key_size + place, x, mask=inside)
    # Every thread must have read the length before one writes it.
    tl.debug_barrier()
    tl.store(lengths + batch, length + new)


@torch.library.custom_op(f"{NAMESPACE}::append_tokens", mutates_args=("queries", "keys", "lengths"))
def append_op(
    queries: Tensor, keys: Tensor, lengths: Tensor, query: Tensor, key: Tensor, cached: bool,
    starts: Tensor | None,
) -> None:  # fmt: skip
    """Arguments as of :func:`append_tokens`."""
    batch, new, heads, dim = query.shape
    if batch == 0 or new == 0:
        return
    with on_device(query.device):
        append_kernel[(batch,)](
            queries, keys, lengths, lengths if starts is None else starts,
            query, *query.stride(), key, *key.stride(),
            new, queries.shape[1], heads * dim, key.shape[2] * dim,
            DIM=dim, CACHED=cached, STARTS=starts is not None, CHUNK=1024, num_warps=4,
        )  # fmt: skip


@append_op.register_fake
def _(*_: Any) -> None:
    return None
