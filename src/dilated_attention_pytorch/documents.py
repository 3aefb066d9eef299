"""Brings packed documents to block boundaries, so that no block mixes two of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import document_numbers


@dataclass(frozen=True, eq=False)
class AlignedDocuments:
    """Where the tokens of packed documents go when every document starts a new block.

    With two documents of 3 and 2 tokens and blocks of 4::

        packed   a b c d e
        aligned  a b c . d e . .

    Attributes:
        length: Tokens of the aligned layout, the same for every cut of as many documents.
        source: ``(batch, length)`` packed position of each aligned token (0 where none).
        target: ``(batch, packed length)`` aligned position of each packed token.
        valid: ``(batch, length)`` booleans: which aligned tokens are real.
        real: ``(batch, packed length)`` booleans: which packed tokens belong to a document.
        document_ids: ``(batch, length)`` int32; the gap after a document has a number of its own.
        cu_seqlens: ``(batch, 2 * documents + 1)``: the aligned layout's own cumulative lengths.
    """

    length: int
    source: Tensor
    target: Tensor
    valid: Tensor
    real: Tensor
    document_ids: Tensor
    cu_seqlens: Tensor

    @property
    def count(self) -> int:
        """Documents per sample, empty ones included."""
        return (self.cu_seqlens.shape[1] - 1) // 2

    def align(self, x: Tensor) -> Tensor:
        """Moves ``(batch, packed length, heads, dim)`` to the aligned layout; gaps are 0."""
        moved = x.gather(1, _like(self.source, x))
        return torch.where(self.valid[..., None, None], moved, 0)

    def restore(self, x: Tensor) -> Tensor:
        """Moves the aligned layout back; tokens that belong to no document get 0."""
        moved = x.gather(1, _like(self.target, x))
        return torch.where(self.real[..., None, None], moved, 0)


def align_documents(
    cu_seqlens: Tensor, batch: int, length: int, block_size: int
) -> AlignedDocuments:
    """Plans the aligned layout. Does not wait for the device.

    Args:
        cu_seqlens: As :func:`block_sparse_attention` takes it.
        batch: Samples.
        length: Packed tokens per sample.
        block_size: Tokens per block.

    Raises:
        ValueError: If ``cu_seqlens`` does not fit.
    """
    device = cu_seqlens.device
    number = document_numbers(cu_seqlens, batch, length, device).long()
    edges = (cu_seqlens[None] if cu_seqlens.dim() == 1 else cu_seqlens).long()
    sizes = edges.diff(dim=1)
    blocks = (sizes + block_size - 1).div(block_size, rounding_mode="floor")
    ends = (blocks * block_size).cumsum(1)
    starts = ends - blocks * block_size
    # Every document can waste at most one partial block.
    aligned = (length // block_size + min(sizes.shape[1], length)) * block_size
    aligned = max(aligned, ceil_div(length, block_size) * block_size)

    real = number >= 0
    index = number.clamp(min=0)
    position = torch.arange(length, device=device).expand(batch, length)
    target = starts.gather(1, index) + position - edges[:, :-1].gather(1, index)
    target = torch.where(real, target, 0)

    place = torch.arange(aligned, device=device).expand(batch, aligned).contiguous()
    owner = torch.searchsorted(ends.contiguous(), place, right=True)
    inside = owner < sizes.shape[1]
    owner = owner.clamp(max=sizes.shape[1] - 1)
    local = place - starts.gather(1, owner)
    valid = inside & (local < sizes.gather(1, owner))
    source = torch.where(valid, edges[:, :-1].gather(1, owner) + local, 0)
    ids = torch.where(valid, 2 * owner, 2 * owner + 1)
    ids = torch.where(inside, ids, -1).int()
    bounds = torch.stack([starts + sizes, ends], -1).flatten(1)
    bounds = torch.cat([torch.zeros_like(bounds[:, :1]), bounds], 1)
    return AlignedDocuments(aligned, source, target, valid, real, ids, bounds)


def _like(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None, None].expand(*index.shape, *x.shape[2:])
