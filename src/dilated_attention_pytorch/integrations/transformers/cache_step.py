"""Where the new tokens of a forward pass stand in a cache, read once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.mask import OFFSET, PACKED, PLAIN

# Where a mask keeps what was read of it: layers share the mask, and reading waits for the device.
_READ = "_dilated_attention_cache_step"


@dataclass(eq=False)
class CacheStep:
    """New tokens of samples that have no padding but on the left.

    Attributes:
        place: Place of the first new token in the cache; so many are before it.
        end: Place behind the last new token.
        starts: ``(batch,)`` int64 place of each sample's first token; None: all 0.
        whole: Whether no new token is padding.
    """

    place: int
    end: int
    starts: Tensor | None = None
    whole: bool = True
    _agreed: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, q_len: int, kv_len: int) -> CacheStep | None:
        """Reads a compact mask; waits for the device once, unless it is a plain causal one.

        Args:
            mask: From :func:`compact_mask`.
            q_len: New tokens.
            kv_len: Places of the cache that the mask speaks of.

        Returns:
            None if padding stands elsewhere than on the left, or for packed documents.
        """
        if mask.shape[2] == PACKED:
            return None
        if mask.shape[2] == PLAIN:
            return cls(kv_len - q_len, kv_len)
        if mask.is_inference():
            # It has no version, which tells whether it is what was read.
            return _read(mask, q_len)
        key = (q_len, mask._version)
        known: tuple[tuple[int, int], CacheStep | None] | None = getattr(mask, _READ, None)
        if known is None or known[0] != key:
            known = (key, _read(mask, q_len))
            setattr(mask, _READ, known)
        return known[1]

    def agrees(self, starts: Tensor | None) -> bool:
        """Whether samples that began at ``starts`` begin there still."""
        if starts is None or self.starts is None:
            return starts is self.starts
        if starts is not self._agreed:
            if starts.shape != self.starts.shape or not torch.equal(starts, self.starts):
                return False
            self._agreed = starts
        return True


def _read(mask: Tensor, q_len: int) -> CacheStep | None:
    offset = mask[:, 0, -1, 0].long()
    if mask.shape[2] == OFFSET:
        place = int(offset[0])
        return CacheStep(place, place + q_len)
    valid = mask[:, 0, 0].bool()
    end = offset + q_len
    starts = torch.where(valid.any(1), valid.int().argmax(1), end)
    slot = torch.arange(valid.shape[1], device=mask.device)
    expected = (slot >= starts[:, None]) & (slot < end[:, None])
    left_alone = (valid == expected).all() & (offset == offset[0]).all()
    place, left, latest = torch.stack([offset[0], left_alone.long(), starts.amax()]).tolist()
    return CacheStep(place, place + q_len, starts, latest <= place) if left else None
