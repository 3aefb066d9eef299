"""The transpose of a pattern: per key block the rows that keep it, by counting.

One bit per tile says whether it is kept, 32 rows to a word::

    rows 0..31 of column j    0 1 0 0 1 1 ...     a tile's place in the list of its column is
                                      ^ tile      the number of bits above it (here 1)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_attention_pytorch.ops.operators import NAMESPACE
from dilated_attention_pytorch.ops.triton_device import VARYING, follow, on_device, overlap


@triton.jit(do_not_specialize=VARYING)
def mark_kernel(
    indices, counts, marks, num_rows, columns, words, width,
    W: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sets the bits of 32 rows' tiles, which share one word per column, and clears the others."""
    follow(PDL)
    word = tl.program_id(0) % words
    plane = tl.cast(tl.program_id(0) // words, tl.int64)
    target = marks + (plane * words + word) * columns
    for start in range(0, columns, C):
        column = start + tl.arange(0, C)
        tl.store(target + column, column * 0, mask=column < columns)
    # Other threads' zeros must not come after this one's bits.
    tl.debug_barrier()
    bit = tl.arange(0, 32)
    place = plane * num_rows + word * 32 + bit
    count = tl.load(counts + place, mask=word * 32 + bit < num_rows, other=0)
    value = ((bit * 0 + 1).to(tl.uint32) << bit.to(tl.uint32)).to(tl.int32, bitcast=True)
    for start in range(0, tl.max(count, 0), W):
        slot = start + tl.arange(0, W)
        used = slot[None, :] < count[:, None]
        j = tl.load(indices + place[:, None] * width + slot[None, :], mask=used, other=0)
        tl.atomic_or(target + j, j * 0 + value[:, None], mask=used, sem="relaxed")


@triton.jit
def _ones(word):
    """How many bits of unsigned words are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return (word + (word >> 16)) & 0x3F


@triton.jit
def _store_offsets(offsets, plane, columns, column, carried, number):
    """Where the lists of some columns end; ``carried`` entries come before them."""
    running = carried + tl.cumsum(number, 0)
    tl.store(offsets + plane * (columns + 1) + 1 + column, running, mask=column < columns)


@triton.jit(do_not_specialize=VARYING)
def rank_kernel(
    marks, before, totals, offsets, columns, words,
    WORDS: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For every word of some columns the bits set in the words above it, and the columns' sums.

    ``WHOLE``: the program has all columns, and turns the sums into offsets.
    """
    follow(PDL)
    plane = tl.cast(tl.program_id(1), tl.int64)
    column = tl.program_id(0) * C + tl.arange(0, C)
    ok = column < columns
    carried = tl.zeros([C], tl.int32)
    step = tl.arange(0, WORDS)
    for start in range(0, words, WORDS):
        word = start + step
        place = (plane * words + word)[:, None] * columns + column[None, :]
        here = (word < words)[:, None] & ok[None, :]
        bits = tl.load(marks + place, mask=here, other=0).to(tl.uint32, bitcast=True)
        number = _ones(bits).to(tl.int32)
        running = tl.cumsum(number, 0) - number + carried[None, :]
        tl.store(before + place, running, mask=here)
        carried += tl.sum(number, 0)
    if WHOLE:
        tl.store(offsets + plane * (columns + 1) + tl.arange(0, 1), tl.zeros([1], tl.int32))
        _store_offsets(offsets, plane, columns, column, 0, carried)
    else:
        tl.store(totals + plane * columns + column, carried, mask=ok)


@triton.jit(do_not_specialize=VARYING)
def offset_kernel(totals, offsets, columns, C: tl.constexpr, PDL: tl.constexpr):
    """Where the list of each column of a plane starts."""
    follow(PDL)
    plane = tl.cast(tl.program_id(0), tl.int64)
    lane = tl.arange(0, C)
    carried = tl.zeros([1], tl.int32)
    tl.store(offsets + plane * (columns + 1) + tl.arange(0, 1), carried)
    for start in range(0, columns, C):
        column = start + lane
        number = tl.load(totals + plane * columns + column, mask=column < columns, other=0)
        _store_offsets(offsets, plane, columns, column, carried, number)
        carried += tl.sum(number, 0)


@triton.jit(do_not_specialize=VARYING)
def place_kernel(
    indices, counts, marks, before, offsets, slots, num_rows, columns, words, width,
    ROWS: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes each tile of some rows to its place in the list of its column."""
    follow(PDL)
    tiles = tl.cdiv(num_rows, ROWS)
    row = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    plane = tl.cast(tl.program_id(0) // tiles, tl.int64)
    slot = tl.arange(0, W)[None, :]
    ok = row < num_rows
    place = plane * num_rows + row
    used = ok & (slot < tl.load(counts + place, mask=ok, other=0))
    j = tl.load(indices + place * width + slot, mask=used, other=0)
    word = (plane * words + row // 32) * columns + j
    bits = tl.load(marks + word, mask=used, other=0).to(tl.uint32, bitcast=True)
    earlier = ((row * 0 + 1).to(tl.uint32) << (row % 32).to(tl.uint32)) - 1
    rank = tl.load(before + word, mask=used, other=0) + _ones(bits & earlier).to(tl.int32)
    start = tl.load(offsets + plane * (columns + 1) + j, mask=used, other=0)
    target = slots + plane * num_rows * width + start + rank
    tl.store(target, row * width + slot, mask=used)


@torch.library.custom_op(f"{NAMESPACE}::transpose_lists", mutates_args=())
def transpose_op(counts: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Offsets ``(b, h, j + 1)`` and slots ``(b, h, i * k)`` of packed ascending lists."""
    offsets, slots = _empty(counts, indices, columns)
    counts, indices = counts.contiguous(), indices.contiguous()
    batch, heads, rows, width = indices.shape
    planes = batch * heads
    if rows == 0 or width == 0 or columns == 0 or planes == 0:
        return offsets.zero_(), slots
    words, device = triton.cdiv(rows, 32), indices.device
    marks = torch.empty(planes, words, columns, dtype=torch.int32, device=device)
    before = torch.empty_like(marks)
    totals = torch.empty(planes, columns, dtype=torch.int32, device=device)
    w, c = triton.next_power_of_2(width), triton.next_power_of_2(columns)
    # One program for the columns of a plane while it is quick; otherwise few columns a program, so
    # that there are programs enough for the machine.
    whole = c * words <= 16384
    block = c if whole else 32
    step = min(triton.next_power_of_2(words), 8192 // block if whole else 64)
    with on_device(device):
        mark_kernel[(words * planes,)](
            indices, counts, marks, rows, columns, words, width,
            W=min(w, 64), C=min(c, 1024), num_warps=8, **overlap(device),
        )  # fmt: skip
        rank_kernel[(triton.cdiv(columns, block), planes)](
            marks, before, totals, offsets, columns, words,
            WORDS=step, C=block, WHOLE=whole, num_warps=8 if whole else 4, **overlap(device),
        )  # fmt: skip
        if not whole:
            offset_kernel[(planes,)](
                totals, offsets, columns, C=min(c, 2048), num_warps=4, **overlap(device)
            )
        block = max(1024 // w, 1)
        place_kernel[(triton.cdiv(rows, block) * planes,)](
            indices, counts, marks, before, offsets, slots, rows, columns, words, width,
            ROWS=block, W=w, num_warps=min(max(block * w // 256, 1), 8), **overlap(device),
        )  # fmt: skip
    return offsets, slots


@transpose_op.register_fake
def _empty(counts: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    b, h, i, k = indices.shape
    return indices.new_empty(b, h, columns + 1), indices.new_empty(b, h, i * k)
