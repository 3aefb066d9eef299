"""Where the new tokens of a forward pass stand in a cache, read once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.mask import OFFSET, PACKED, PLAIN

# Where a mask keeps what was read of it: layers share the mask, and reading waits for the device.
_READ = "_dilated_attention_cache_step"


@dataclass(frozen=True, eq=False)
class Part:
    """Samples of a batch that go on alike.

    Attributes:
        samples: Their numbers, int64; None: all.
        followed: Whether the cache holds tokens and padding where it did before.
        new: Of the new places, those that hold tokens.
        gaps: Whether padding stands between tokens or behind the last.
        begun: Whether the places before hold tokens of theirs.
        starts: ``(samples,)`` int64 place of each one's first token; None: all 0, or ``gaps``.
    """

    samples: Tensor | None
    followed: bool
    new: int
    gaps: bool = False
    begun: bool = True
    starts: Tensor | None = None


@dataclass(eq=False)
class CacheStep:
    """New places of a cache.

    Attributes:
        place: The first of them; so many are before it.
        end: The place behind the last of them.
        seen: ``(batch, end)`` booleans: places that hold tokens and no padding; None: all do.
        packed: Whether the tokens, which are all that the cache holds, are packed documents.
    """

    place: int
    end: int
    seen: Tensor | None = None
    packed: bool = False
    _parts: tuple[Tensor | None, list[Part]] | None = None

    @classmethod
    def of(cls, mask: Tensor, q_len: int, kv_len: int) -> CacheStep | None:
        """Reads a compact mask; waits for the device once, unless it is a plain causal one.

        Args:
            mask: From :func:`compact_mask`.
            q_len: New tokens.
            kv_len: Places of the cache that the mask speaks of.

        Returns:
            None if new tokens stand at other places in other samples.
        """
        if mask.shape[2] == PACKED:
            return cls(0, kv_len, packed=True)
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

    def parts(self, before: Tensor | None) -> list[Part]:
        """The samples by what is to be done for them, so that none decides for another.

        Waits for the device once, unless there is no padding.

        Args:
            before: ``seen`` of the step before, whose places are those up to this one's.
        """
        new = self.end - self.place
        if self.seen is None and before is None:
            return [Part(None, True, new)]
        if self._parts is None or self._parts[0] is not before:
            self._parts = before, self._divide(before)
        return self._parts[1]

    def _divide(self, before: Tensor | None) -> list[Part]:
        seen = self.seen
        if seen is None:
            if before is None:
                raise RuntimeError("there is no padding to go by.")
            seen = before.new_ones(len(before), self.end)
        old, new = seen[:, : self.place], seen[:, self.place :]
        same = old.all(1) if before is None else (old == before).all(1)
        starts = torch.where(seen.any(1), seen.int().argmax(1), self.end)
        gaps = seen.sum(1) != self.end - starts
        kinds: dict[tuple[int, ...], list[int]] = {}
        begun = old.any(1)
        rows = torch.stack([same.long(), new.sum(1), gaps.long(), begun.long()], 1).tolist()
        for number, row in enumerate(rows):
            kinds.setdefault(tuple(row), []).append(number)
        parts = []
        for (followed, count, broken, had), numbers in kinds.items():
            samples = None
            if len(kinds) > 1:
                samples = torch.tensor(numbers, dtype=torch.long, device=seen.device)
            own = starts if samples is None else starts[samples]
            starts_of_part = None if broken else own
            parts.append(
                Part(samples, bool(followed), count, bool(broken), bool(had), starts_of_part)
            )
        return parts


def _read(mask: Tensor, q_len: int) -> CacheStep | None:
    offset = mask[:, 0, -1, 0].long()
    place, alike = torch.stack([offset[0], (offset == offset[0]).all().long()]).tolist()
    if not alike:
        return None
    end = place + q_len
    seen = None if mask.shape[2] == OFFSET else mask[:, 0, 0, :end].bool()
    return CacheStep(place, end, seen)
