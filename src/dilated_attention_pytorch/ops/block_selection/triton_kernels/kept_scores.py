"""Kernels of the kept tiles' score gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_attention_pytorch.ops.block_selection.triton_kernels.shared import VARYING


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
