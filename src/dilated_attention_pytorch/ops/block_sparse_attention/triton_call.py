"""The arguments that the launchers of the Triton kernels share, and how kernels see tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilated_attention_pytorch.ops.block_sparse_attention.launch_config import TileShape
from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import INTERPRETED
from dilated_attention_pytorch.ops.triton_device import capability


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
            "UPCAST": INTERPRETED,
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


def source(x: Tensor, heads: int, count: int, call: Call) -> tuple[Any, bool]:
    """A tensor descriptor for boxes of ``count`` tokens, if the hardware takes this layout."""
    unit = 16 // x.element_size()
    strides = [x.stride(0), x.stride(2), x.stride(1)]
    shape = [x.shape[0], x.shape[2], x.shape[1]]
    # The stride of a dimension of one element is never used, but still checked.
    strides = [unit if size == 1 else step for size, step in zip(shape, strides, strict=True)]
    fits = all(step > 0 and step % unit == 0 for step in strides) and x.numel() > 0
    hardware = INTERPRETED or capability(x.device) >= (9, 0)
    if not hardware or not fits or x.data_ptr() % 16:
        return x, False
    box = [1, heads, count, call.padded_head_dim]
    return TensorDescriptor(x, [*shape, x.shape[3]], [*strides, 1], box), True
