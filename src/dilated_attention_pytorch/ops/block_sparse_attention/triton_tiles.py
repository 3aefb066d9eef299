"""What the Triton kernels of block-sparse attention share: tiles, calls, launch configurations.

Names inside all kernels: a *tile* is one kept (query block, key block) pair of the pattern. A
program works on ``ROWS`` query tokens of ``PACK`` query heads that share keys and pattern, or on
``COLUMNS`` key tokens; both divide the pattern's blocks. Logits live in base 2: the scale carries
log2(e), so that every exponential is one ``exp2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilated_attention_pytorch.ops.triton_device import INTERPRETED, PRECISE, capability, strides


@triton.jit
def load_rows(
    source, stride_b, stride_h, stride_n, batch, head, start, length,
    HEADS: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``(HEADS * COUNT, D)``: tokens ``start...`` of ``HEADS`` heads; zero past the edges."""
    if TMA:
        tile = source.load([batch, head, start, 0]).reshape([HEADS * COUNT, D])
    else:
        row = tl.arange(0, HEADS * COUNT)
        token = start + row % COUNT
        column = tl.arange(0, D)
        offset = tl.cast(batch, tl.int64) * stride_b + (head + row // COUNT).to(tl.int64) * stride_h
        offset += token.to(tl.int64) * stride_n
        inside = (token < length)[:, None] & (column < HEAD_DIM)[None, :]
        tile = tl.load(source + offset[:, None] + column[None, :], mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(
    target, stride_b, stride_h, stride_n, batch, head, start, length, tile,
    HEADS: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, HEADS * COUNT)
    token = start + row % COUNT
    column = tl.arange(0, D)
    offset = tl.cast(batch, tl.int64) * stride_b + (head + row // COUNT).to(tl.int64) * stride_h
    offset += token.to(tl.int64) * stride_n
    inside = (token < length)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(
        target + offset[:, None] + column[None, :], tile.to(target.dtype.element_ty), mask=inside
    )


@triton.jit
def visible(
    row, column, batch, key_limit, offset, documents, q_len,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The token rule for broadcastable token numbers ``row`` and ``column``."""
    ok = (column < key_limit) & (row < q_len)
    if CAUSAL:
        ok = ok & (column <= row + offset)
    if DOCUMENTS:
        ids = documents + tl.cast(batch, tl.int64) * q_len
        of_row = tl.load(ids + row, mask=row < q_len, other=-1)
        of_column = tl.load(ids + column, mask=column < q_len, other=-2)
        ok = ok & (of_row == of_column) & (of_row >= 0)
    return ok


@triton.jit
def finite_part(tile):
    """0 for NaN and infinities, which in a product would reach rows that must not read them.

    0 * NaN is NaN. Rows that do read them must have NaN as their weight.
    """
    return tl.where(tl.abs(tile) < float("inf"), tile, 0.0).to(tile.dtype)


@triton.jit
def count_left_out(biases, count):
    """How many of the first ``count`` biases are -inf: nobody reads their tiles."""
    lane = tl.arange(0, 128)
    total = 0
    for chunk in range(0, count, 128):
        place = chunk + lane
        bias = tl.load(biases + place, mask=place < count, other=0.0)
        total += tl.sum((bias == float("-inf")).to(tl.int32))
    return total


@triton.jit
def count_tiles_left_out(biases, entries, count, width, stride_i):
    """The same for tiles listed as ``query_block * width + slot``."""
    lane = tl.arange(0, 128)
    total = 0
    for chunk in range(0, count, 128):
        place = chunk + lane
        entry = tl.load(entries + place, mask=place < count, other=0)
        at = (entry // width).to(tl.int64) * stride_i + entry % width
        bias = tl.load(biases + at, mask=place < count, other=0.0)
        total += tl.sum((bias == float("-inf")).to(tl.int32))
    return total


@triton.jit
def document_of(documents, bounds, batch, first, last, q_len):
    """Start and end of the one document that tokens ``first`` to ``last`` share; (0, 0) if many."""
    ids = documents + tl.cast(batch, tl.int64) * q_len
    low = tl.load(ids + first)
    high = tl.load(ids + last)
    one = (low == high) & (low >= 0)
    ends = bounds + tl.cast(batch, tl.int64) * 2 * q_len
    start = tl.load(ends + first)
    end = tl.load(ends + q_len + first)
    return tl.where(one, start, 0), tl.where(one, end, 0)


@triton.jit
def count_below(entries, count, divisor, factor, threshold):
    """How many of ``count`` ascending entries have ``entry // divisor * factor`` below it."""
    lane = tl.arange(0, 128)
    total = 0
    for chunk in range(0, count, 128):
        place = chunk + lane
        entry = tl.load(entries + place, mask=place < count, other=0)
        below = (entry // divisor * factor < threshold) & (place < count)
        total += tl.sum(below.to(tl.int32))
    return total


@triton.jit
def unmasked_tiles(
    entries, biases, count, first, key_limit, offset, documents, bounds, batch, q_len,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """``(low, full)``: entries ``[low, full)`` of a row's ascending list need no mask."""
    low = 0
    unmasked_end = key_limit
    if CAUSAL:
        unmasked_end = tl.minimum(unmasked_end, first + offset + 1)
    if DOCUMENTS:
        last = tl.minimum(first + ROWS, q_len) - 1
        start, end = document_of(documents, bounds, batch, first, last, q_len)
        unmasked_end = tl.minimum(unmasked_end, end)
        low = count_below(entries, count, 1, BLOCK_K, start)
    full = count_below(entries, count, 1, BLOCK_K, unmasked_end - BLOCK_K + 1)
    full = tl.maximum(full, low)
    if BIAS:
        full = tl.where(count_left_out(biases, count) > 0, low, full)
    return low, full


@dataclass(frozen=True)
class TileShape:
    """What a launch depends on.

    Attributes:
        block_q: Tokens per query block.
        block_k: Tokens per key block.
        head_dim: The power of two that a tile's last dimension takes.
        shared: Query heads with the same key head and list.
        full_precision: Whether inputs are float32.
    """

    block_q: int
    block_k: int
    head_dim: int
    shared: int = 1
    full_precision: bool = False

    def pack(self, rows: int) -> int:
        """Heads in a tile of at most 64 rows: a power of two dividing the shared ones."""
        pack = 1
        while self.shared % (2 * pack) == 0 and 2 * pack * rows <= 64:
            pack *= 2
        return pack


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        rows: Query tokens of each packed head in a tile.
        columns: Key tokens in a tile.
        num_warps: Warps of a program.
        num_stages: Tiles in flight from memory.
        maxnreg: Registers of a thread, so that more programs share a multiprocessor. None: free.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """Triton's launch options."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Triton's interpreter does not know this option.
        if self.maxnreg is not None and not INTERPRETED:
            found["maxnreg"] = self.maxnreg
        return found


def _float32_config(tile: TileShape) -> LaunchConfig:
    """The launch (`benchmarks/results/tune_triton_float32.json`) of the forward and dQ kernels.

    A warp for 16 rows or columns: the operands of three TF32 products stand in registers.
    """
    if tile.head_dim > 128:
        return LaunchConfig(16, 16, 4, 1)
    small = tile.head_dim <= 64
    rows, columns = 64 if small and tile.block_q >= 64 else 16, 64 if small else 32
    columns = min(tile.block_k, columns)
    return LaunchConfig(rows, columns, max(tile.pack(rows) * rows, columns) // 16, 1)


def _small_warps(tile: TileShape, rows: int, columns: int, numbers: int) -> int | None:
    """Warps (`benchmarks/results/tune_triton_small.json`) for blocks below 64; None from there on.

    Args:
        tile: The call's.
        rows: Of a tile, of each packed head.
        columns: Of a tile.
        numbers: Of the longer side times ``head_dim`` that a warp takes.
    """
    longer = max(tile.pack(rows) * rows, columns)
    return None if longer >= 64 else min(max(longer * tile.head_dim // numbers, 1), 4)


def forward_config(tile: TileShape) -> LaunchConfig:
    """The launch (`benchmarks/results/tune_triton.json`) of the forward kernel."""
    d = tile.head_dim
    if tile.full_precision:
        return _float32_config(tile)
    rows, columns = min(tile.block_q, 64), min(tile.block_k, 64)
    warps = _small_warps(tile, rows, columns, 2048) or 4
    return LaunchConfig(rows, columns, warps, 3 if 64 < d <= 128 else 2)


def query_config(tile: TileShape) -> LaunchConfig:
    """The launch (`benchmarks/results/tune_triton.json`) of the dQ kernel."""
    d = tile.head_dim
    if tile.full_precision:
        return _float32_config(tile)
    rows, columns = min(tile.block_q, 64), min(tile.block_k, 64 if d <= 128 else 32)
    warps = _small_warps(tile, rows, columns, 1024)
    if warps is not None and d <= 128:
        return LaunchConfig(rows, columns, warps, 3)
    return LaunchConfig(rows, columns, 8 if d > 128 else 4, 2, 128 if d <= 64 else None)


def key_config(tile: TileShape) -> LaunchConfig:
    """The launch (`benchmarks/results/tune_triton.json`) of the dK, dV kernel."""
    d = tile.head_dim
    if tile.full_precision:
        if d <= 64 and min(tile.block_q, tile.block_k) >= 64:
            return LaunchConfig(64, 64, 4, 1)
        rows = min(tile.block_q, 32 if d <= 128 else 16)
        return LaunchConfig(rows, 16, 2 if tile.block_q == 16 and d <= 128 else 4, 1)
    rows = min(tile.block_q, 64 if d <= 128 else 32)
    columns = min(tile.block_k, 64)
    warps = _small_warps(tile, rows, columns, 1024)
    if d <= 64:
        return LaunchConfig(rows, columns, warps or 4, 3, None if warps else 168)
    return LaunchConfig(rows, columns, 8 if d > 128 else warps or 4, 2 if d <= 128 else 1)


def mass_config(tile: TileShape) -> LaunchConfig:
    """The launch (`docs/log.md`) of the mass alone: it waits for keys, so it takes large tiles."""
    if tile.full_precision:
        return query_config(tile)
    rows, columns = min(tile.block_q, 128 if tile.head_dim > 64 else 64), min(tile.block_k, 128)
    return LaunchConfig(rows, columns, 8 if rows == 128 else 4, 2)


@dataclass(frozen=True, eq=False)
class Call:
    """What the forward and the backward launchers share.

    Attributes:
        query: ``(b, n, h, d)``, like ``key`` and ``value`` with any strides but 1 for ``d``.
        key: ``(b, m, g, d)``.
        value: ``(b, m, g, d)``.
        counts: ``(b, p, i)`` int32.
        indices: ``(b, p, i, k)`` int32.
        block_bias: ``(b, p, i, k)`` float32 or None.
        key_lengths: ``(b,)`` or None.
        query_offset: ``(b,)`` or None: then ``offset`` counts.
        document_ids: ``(b, n)`` int32 or None.
        document_bounds: ``(b, 2, n)`` int32: start and end of each token's document, or None.
        block_q: Tokens per query block.
        block_k: Tokens per key block.
        causal: Whether later keys are hidden.
        offset: Key position of query 0.
        scale: Factor of the logits, not negative.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    counts: Tensor
    indices: Tensor
    block_bias: Tensor | None
    key_lengths: Tensor | None
    query_offset: Tensor | None
    document_ids: Tensor | None
    document_bounds: Tensor | None
    block_q: int
    block_k: int
    causal: bool
    offset: int
    scale: float

    def tile(self) -> TileShape:
        """What the launch configurations depend on."""
        shared = min(self.group, self.heads_per_pattern)
        full_precision = self.query.dtype == torch.float32
        return TileShape(self.block_q, self.block_k, self.padded_head_dim, shared, full_precision)

    @property
    def empty(self) -> bool:
        """Whether there is no tile at all, so that nothing need be launched."""
        return 0 in (self.query.numel(), self.key.numel(), self.indices.numel())

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def heads_per_pattern(self) -> int:
        """Query heads that share one list of tiles."""
        return self.query.shape[2] // self.counts.shape[1]

    @property
    def padded_head_dim(self) -> int:
        """The power of two that a tile's last dimension takes."""
        return max(16, triton.next_power_of_2(self.query.shape[3]))

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments that all kernels share."""
        full_precision = torch.get_float32_matmul_precision() == "highest"
        return {
            "GROUP": self.group,
            "HEADS_PER_PATTERN": self.heads_per_pattern,
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "D": self.padded_head_dim,
            "HEAD_DIM": self.query.shape[3],
            "CAUSAL": self.causal,
            "BIAS": self.block_bias is not None,
            "LENGTHS": self.key_lengths is not None,
            "OFFSETS": self.causal and self.query_offset is not None,
            "DOCUMENTS": self.document_ids is not None,
            "EVEN_KEYS": self.key.shape[1] % self.block_k == 0,
            "UPCAST": INTERPRETED,
            "PRECISION": PRECISE.value if full_precision else "tf32",
        }

    def mask_arguments(self) -> tuple[Any, ...]:
        """Block bias with its strides and the tensors of the token rule; unused ones stand in."""
        stand_in = self.counts
        bias = self.block_bias
        return (
            *((stand_in, 0, 0, 0) if bias is None else (bias, *bias.stride()[:3])),
            stand_in if self.key_lengths is None else self.key_lengths,
            stand_in if self.query_offset is None else self.query_offset,
            stand_in if self.document_ids is None else self.document_ids,
            stand_in if self.document_bounds is None else self.document_bounds,
        )


def sources(
    tensors: tuple[Tensor, ...], heads: int, count: int, call: Call
) -> tuple[list[tuple[Any, ...]], bool]:
    """How a kernel reads boxes of ``count`` tokens: each tensor's arguments, and whether by TMA.

    That takes tensor descriptors, of all or of none, if the hardware takes their layouts.
    """
    found = [_descriptor(x, heads, count, call) for x in tensors]
    tma = all(x is not None for x in found)
    pairs = zip(found, tensors, strict=True)
    return [(box if tma else x, *strides(x)) for box, x in pairs], tma


def _descriptor(x: Tensor, heads: int, count: int, call: Call) -> TensorDescriptor | None:
    """A tensor descriptor for boxes of ``count`` tokens, if the hardware takes this layout."""
    unit = 16 // x.element_size()
    shape = [x.shape[0], x.shape[2], x.shape[1]]
    # The stride of a dimension of one element is never used, but still checked.
    steps = [unit if size == 1 else step for size, step in zip(shape, strides(x), strict=True)]
    fits = all(step > 0 and step % unit == 0 for step in steps) and x.numel() > 0
    hardware = INTERPRETED or capability(x.device) >= (9, 0)
    if not hardware or not fits or x.data_ptr() % 16:
        return None
    box = [1, heads, count, call.padded_head_dim]
    return TensorDescriptor(x, [*shape, x.shape[3]], [*steps, 1], box)
