"""Launches the kernels that summarise blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.block_selection.triton_launch.shared import (
    batch_stride,
    overlap,
    per_sample,
)
from dilated_attention_pytorch.ops.triton_device import on_device, strides

# Tokens that one warp summarises at a time.
_TOKENS = 16


@dataclass(frozen=True)
class Pooling:
    """How blocks are summarised.

    Attributes:
        names: Poolings in the order of the output.
        block_size: Tokens per block.
        past: Whether blocks end with the first token of the block that they stand for
            (``past_windows``); with two tensors, those of the first.
    """

    names: tuple[str, ...]
    block_size: int
    past: bool = False

    def constants(self, head_dim: int) -> dict[str, int]:
        """The kernels' compile-time arguments."""

        def place(name: str) -> int:
            return self.names.index(name) if name in self.names else -1

        return {
            "BLOCK": self.block_size,
            "T": triton.next_power_of_2(self.block_size),
            "D": triton.next_power_of_2(head_dim),
            "HEAD_DIM": head_dim,
            "MEAN": place("mean"),
            "MAX": place("max"),
            "MIN": place("min"),
            "ATTENTION": place("attention"),
            "POOLINGS": len(self.names),
            "SHIFT": self.block_size - 1 if self.past else 0,
        }

    def num_warps(self, head_dim: int) -> int:
        """Warps of a program: about 64 numbers a thread."""
        tile = triton.next_power_of_2(self.block_size) * triton.next_power_of_2(head_dim)
        return min(max(tile // 2048, 1), 16)


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is summarised.

    Attributes:
        x: ``(b, n, h, d)``, last dimension contiguous.
        valid: ``(1 or b, n)`` booleans, contiguous, or None.
        pool_query: ``(h, d)`` contiguous or None.
        out: Summaries ``(b, h, i, s)``.
        starts: ``(1 or b, i)`` int32, last dimension contiguous: the first block of each block's
            document, or None. Needs ``Pooling.past``.
    """

    x: Tensor
    valid: Tensor | None
    pool_query: Tensor | None
    out: Tensor
    starts: Tensor | None = None


def launch_summaries(
    first: Tokens, pooling: Pooling, place: Tensor | None = None, second: Tokens | None = None
) -> None:
    """Writes summaries and, for the gradient, where maxima and minima lie.

    Args:
        first: Tokens.
        pooling: What to write.
        place: ``(b, h, i, 2, d)`` int16 or None.
        second: Other tokens for the same launch, with ``valid`` or ``pool_query`` if and only if
            ``first`` has them. Their extremes' places are not written.
    """
    parts = [first, second or first]
    batch, _, _, head_dim = first.x.shape
    programs = [part.out.shape[1] * part.out.shape[2] for part in parts]
    if second is None:
        programs[1] = 0
    if batch == 0 or head_dim == 0 or sum(programs) == 0:
        return
    block = pooling.block_size
    t = triton.next_power_of_2(block)
    even = all(part.x.shape[1] % block == 0 for part in parts)
    sizes = [(part.x.shape[1], part.out.shape[2], part.x.shape[2]) for part in parts]
    with on_device(first.x.device):
        kernels.summary_kernel[(sum(programs), batch)](
            *(value for part in parts for value in (part.x, *strides(part.x))),
            *(value for part in parts for value in per_sample(part.valid, part.x)),
            *(part.x if part.pool_query is None else part.pool_query for part in parts),
            *(part.out for part in parts), first.out if place is None else place,
            *_starts(first.starts, first.x), *sizes[0], *sizes[1],
            **pooling.constants(head_dim), VALID=first.valid is not None, PLACE=place is not None,
            FULL=first.valid is None and block == t and even and not pooling.past,
            PAIR=second is not None, STARTS=first.starts is not None,
            CHUNK=min(t, _TOKENS), num_warps=1, **overlap(first.x.device),
        )  # fmt: skip


def launch_summaries_grad(
    grad: Tensor,
    place: Tensor,
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: Pooling,
    grad_x: Tensor,
    grad_pool: Tensor | None,
    starts: Tensor | None = None,
    more: Tensor | None = None,
) -> None:
    """Writes the gradient of the tokens, and each block's share of the pool query's.

    Args:
        grad: ``(b, h, i, s)`` contiguous.
        place: As the forward pass wrote it.
        x: As in the forward pass.
        valid: Likewise.
        pool_query: Likewise.
        pooling: Likewise.
        grad_x: ``(b, n, h, d)`` contiguous.
        grad_pool: ``(b, h, i, d)`` float32 or None.
        starts: As in the forward pass.
        more: ``(b, n, h, d)``, last dimension contiguous: a gradient to add, or None.
    """
    if grad_x.numel() == 0:
        return
    batch, length, heads, head_dim = x.shape
    blocks = grad.shape[2]
    # The tokens behind the last window have a program of their own.
    programs = heads * (blocks + 1 if pooling.past else blocks)
    with on_device(x.device):
        kernels.summary_grad_kernel[(programs, batch)](
            grad, place, x, *strides(x), *per_sample(valid, x),
            x if pool_query is None else pool_query, grad_x,
            grad_x if grad_pool is None else grad_pool, *_starts(starts, x),
            *((grad_x, *strides(grad_x)) if more is None else (more, *strides(more))),
            length, blocks, heads, **pooling.constants(head_dim), VALID=valid is not None,
            STARTS=starts is not None, MORE=more is not None, num_warps=pooling.num_warps(head_dim),
        )  # fmt: skip


def _starts(starts: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    return (stand_in, 0) if starts is None else (starts, batch_stride(starts))
