"""Launches the Triton kernels: layouts and the workspace of the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilated_attention_pytorch.ops.block_sparse_attention import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_sparse_attention.launch_config import (
    LaunchConfig,
    TileShape,
    forward_config,
    key_config,
    mass_config,
    query_config,
)


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
        return TileShape(
            self.block_q, self.block_k, self.padded_head_dim, self.query.dtype == torch.float32
        )

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

    def pack(self, rows: int, limit: int) -> int:
        """Heads that one tile holds: a power of two that divides those sharing keys and list."""
        shared = min(self.group, self.heads_per_pattern)
        pack = 1
        while shared % (2 * pack) == 0 and 2 * pack * rows <= limit:
            pack *= 2
        return pack

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
            "UPCAST": kernels.INTERPRETED,
            "PRECISION": "ieee" if full_precision else "tf32",
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


def launch_forward(
    call: Call, out: Tensor, lse: Tensor, config: LaunchConfig | None = None
) -> None:
    """Writes the output ``(b, n, h, d)`` and the lse ``(b, h, n)``, both preallocated."""
    if out.numel() == 0:
        return
    config = config or forward_config(call.tile())
    batch, q_len, num_heads, _ = call.query.shape
    pack = call.pack(config.rows, 64)
    tiles = triton.cdiv(q_len, config.rows)
    query, tma_q = _source(call.query, pack, config.rows, call)
    key, tma_k = _source(call.key, 1, config.columns, call)
    value, tma_v = _source(call.value, 1, config.columns, call)
    tma = tma_k and tma_v
    with _on(call.query.device):
        kernels.forward_kernel[(tiles, num_heads // pack, batch)](
            query if tma_q else call.query, *_strides(call.query),
            key if tma else call.key, *_strides(call.key),
            value if tma else call.value, *_strides(call.value),
            out, *_strides(out), lse,
            call.counts, *call.counts.stride(),
            call.indices, *call.indices.stride()[:3],
            *call.mask_arguments(),
            q_len, call.key.shape[1], call.offset, call.scale * kernels.LOG2E.value,
            num_heads, tiles,
            **call.constants(), PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
            TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
            **config.options(),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Gradients:
    """Preallocated results of the backward pass.

    Attributes:
        query: ``(b, n, h, d)``.
        key: ``(b, m, g, d)``.
        value: ``(b, m, g, d)``.
        block_bias: ``(b, p, i, k)`` float32 or None.
        mass: ``(b, p, i, k)`` or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    block_bias: Tensor | None
    mass: Tensor | None


def launch_backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    starts: Tensor,
    slots: Tensor,
    grads: Gradients,
    *,
    config: LaunchConfig | None = None,
    config_query: LaunchConfig | None = None,
    overlap: bool = True,
) -> None:
    """Writes all gradients.

    Args:
        call: As in the forward pass.
        out: Its output.
        lse: Its lse.
        grad_out: Gradient of the output; last dimension contiguous.
        grad_lse: Gradient of the lse, contiguous, or None.
        starts: ``PatternTranspose.offsets``.
        slots: ``PatternTranspose.slots``.
        grads: Where to write.
        config: Launch of the dK, dV kernel.
        config_query: Launch of the dQ kernel.
        overlap: Let the dQ kernel fill multiprocessors that the end of the dK, dV kernel leaves
            idle (programmatic dependent launch, Hopper and later).
    """
    batch, q_len, num_heads, _ = call.query.shape
    kv_len, num_kv_heads = call.key.shape[1:3]
    if q_len == 0 or kv_len == 0 or batch == 0:
        for tensor in (grads.query, grads.key, grads.value, grads.block_bias, grads.mass):
            if tensor is not None:
                tensor.zero_()
        return
    config = config or key_config(call.tile())
    query_blocks, width = call.indices.shape[2:]
    padded_len = query_blocks * call.block_q
    pack = call.pack(config.rows, 64)
    query, tma_q = _source(call.query, pack, config.rows, call)
    gradient, tma_g = _source(grad_out, pack, config.rows, call)
    key, tma_k = _source(call.key, 1, config.columns, call)
    value, tma_v = _source(call.value, 1, config.columns, call)
    tma, tma_q = tma_k and tma_v, tma_q and tma_g
    device = call.query.device
    rows = _row_pass(call, out, lse, grad_out, grad_lse)
    lse2, delta, _ = rows
    constants = call.constants()
    config_query = config_query or query_config(call.tile())
    planes = _Planes.make(call, config_query, grads.block_bias is not None, grads.mass is not None)
    overlap = overlap and not kernels.INTERPRETED and _capability(device) >= (9, 0)
    with _on(device):
        grid = (triton.cdiv(kv_len, config.columns), batch * num_kv_heads)
        kernels.key_kernel[grid](
            query if tma_q else call.query, *_strides(call.query),
            key if tma else call.key, *_strides(call.key),
            value if tma else call.value, *_strides(call.value),
            gradient if tma_q else grad_out, *_strides(grad_out),
            grads.key, *_strides(grads.key), grads.value, *_strides(grads.value),
            lse2, delta,
            starts, *starts.stride()[:2], slots, *slots.stride()[:2],
            *call.mask_arguments(),
            q_len, kv_len, padded_len, call.offset, call.scale,
            call.scale * kernels.LOG2E.value, num_heads, query_blocks, width,
            **constants, PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
            TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages, OVERLAP=overlap,
            **config.options(),
        )  # fmt: skip
        _launch_query(call, grad_out, rows, grads.query, planes, config_query, overlap)
    planes.collect(call, rows[2], grads.block_bias, grads.mass)


def launch_mass(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, mass: Tensor) -> None:
    """Writes the tile mass alone, one product per tile; arguments as in :func:`launch_backward`."""
    if out.numel() == 0 or mass.numel() == 0:
        mass.zero_()
        return
    config = mass_config(call.tile())
    rows = _row_pass(call, out, lse, grad_out, None)
    planes = _Planes.make(call, config, False, True)
    with _on(call.query.device):
        _launch_query(call, grad_out, rows, None, planes, config, overlap=False)
    planes.collect(call, rows[2], None, mass)


def _row_pass(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward kernels need of every row: lse in base 2, delta, gradient norm."""
    batch, q_len, num_heads, head_dim = call.query.shape
    padded_len = call.indices.shape[2] * call.block_q
    shape = (batch, num_heads, padded_len)
    lse2, delta, norm = (lse.new_empty(shape, dtype=torch.float32) for _ in range(3))
    with _on(call.query.device):
        kernels.row_kernel[(triton.cdiv(padded_len, 32), num_heads, batch)](
            out, *_strides(out), grad_out, *_strides(grad_out),
            lse, lse if grad_lse is None else grad_lse, lse2, delta, norm,
            q_len, padded_len, num_heads,
            ROWS=32, D=call.padded_head_dim, HEAD_DIM=head_dim, GRAD_LSE=grad_lse is not None,
            num_warps=4,
        )  # fmt: skip
    return lse2, delta, norm


@dataclass(frozen=True, eq=False)
class _Planes:
    """Where the dQ kernel leaves parts of bias gradient and mass: one plane per visit of a tile.

    Attributes:
        block_bias: ``(b, planes, i, k, warps)`` float32 or None.
        mass: Likewise.
    """

    block_bias: Tensor | None
    mass: Tensor | None

    @classmethod
    def make(cls, call: Call, config: LaunchConfig, want_bias: bool, want_mass: bool) -> _Planes:
        parts = (call.block_q // config.rows) * (call.block_k // config.columns)
        batch, _, num_heads, _ = call.query.shape
        planes = num_heads // call.pack(config.rows, 64) * parts
        shape = (batch, planes, *call.indices.shape[2:], config.num_warps)

        def zeros(wanted: bool) -> Tensor | None:
            # Entries past a row's count are never visited.
            return call.query.new_zeros(shape, dtype=torch.float32) if wanted else None

        return cls(zeros(want_bias), zeros(want_mass))

    def collect(
        self, call: Call, norm: Tensor, block_bias: Tensor | None, mass: Tensor | None
    ) -> None:
        """Adds the planes of programs that visited the same tile; normalises the mass."""
        batch, heads, blocks, width = call.indices.shape

        def add(planes: Tensor) -> Tensor:
            # Spelled out, since a pattern without tiles leaves nothing to infer a size from.
            parts = (planes.shape[1] // heads, blocks, width, planes.shape[4])
            return planes.view(batch, heads, *parts).sum((2, 5))

        if block_bias is not None and self.block_bias is not None:
            block_bias.copy_(add(self.block_bias))
        if mass is not None and self.mass is not None:
            rows = norm.view(batch, heads, -1, blocks, call.block_q).sum((2, 4))
            tiny = torch.finfo(torch.float32).tiny
            mass.copy_(add(self.mass) / rows.clamp(min=tiny)[..., None])


def _launch_query(
    call: Call,
    grad_out: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    grad_query: Tensor | None,
    planes: _Planes,
    config: LaunchConfig,
    overlap: bool,
) -> None:
    """The dQ kernel; without ``grad_query`` it computes the planes alone."""
    batch, q_len, num_heads, _ = call.query.shape
    target = call.query if grad_query is None else grad_query
    stand_in = rows[0]
    pack = call.pack(config.rows, 64)
    tiles = triton.cdiv(q_len, config.rows)
    query, tma_q = _source(call.query, pack, config.rows, call)
    gradient, tma_g = _source(grad_out, pack, config.rows, call)
    key, tma_k = _source(call.key, 1, config.columns, call)
    value, tma_v = _source(call.value, 1, config.columns, call)
    tma, tma_q = tma_k and tma_v, tma_q and tma_g
    options = config.options() | ({"launch_pdl": True} if overlap else {})
    kernels.query_kernel[(tiles, num_heads // pack, batch)](
        query if tma_q else call.query, *_strides(call.query),
        key if tma else call.key, *_strides(call.key),
        value if tma else call.value, *_strides(call.value),
        gradient if tma_q else grad_out, *_strides(grad_out),
        target, *_strides(target), *rows,
        stand_in if planes.block_bias is None else planes.block_bias,
        stand_in if planes.mass is None else planes.mass,
        call.counts, *call.counts.stride(),
        call.indices, *call.indices.stride()[:3],
        *call.mask_arguments(),
        q_len, call.key.shape[1], rows[0].shape[2], call.offset, call.scale,
        call.scale * kernels.LOG2E.value, num_heads, tiles, *call.indices.shape[2:],
        **call.constants(), PACK=pack, ROWS=config.rows, COLUMNS=config.columns,
        GRAD_Q=grad_query is not None, GRAD_BIAS=planes.block_bias is not None,
        MASS=planes.mass is not None,
        WARPS=config.num_warps, TMA_Q=tma_q, TMA=tma, STAGES=config.num_stages,
        OVERLAP=overlap, **options,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of ``(b, n, h, d)``."""
    return x.stride(0), x.stride(2), x.stride(1)


def _source(x: Tensor, heads: int, count: int, call: Call) -> tuple[Any, bool]:
    """A tensor descriptor for boxes of ``count`` tokens, if the hardware takes this layout."""
    unit = 16 // x.element_size()
    strides = [x.stride(0), x.stride(2), x.stride(1)]
    shape = [x.shape[0], x.shape[2], x.shape[1]]
    # The stride of a dimension of one element is never used, but still checked.
    strides = [unit if size == 1 else step for size, step in zip(shape, strides, strict=True)]
    fits = all(step > 0 and step % unit == 0 for step in strides) and x.numel() > 0
    hardware = kernels.INTERPRETED or _capability(x.device) >= (9, 0)
    if not hardware or not fits or x.data_ptr() % 16:
        return x, False
    box = [1, heads, count, call.padded_head_dim]
    return TensorDescriptor(x, [*shape, x.shape[3]], [*strides, 1], box), True


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _on(device: torch.device) -> Any:
    """Kernels launch on the current device: makes it the tensors' one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
