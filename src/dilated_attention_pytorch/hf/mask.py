"""A mask of one number per key instead of one per pair of tokens.

Models of transformers ask for a mask once per forward pass and hand it to every attention layer.
Block-sparse attention needs no square of booleans, but must know about padding, the place of the
queries among the keys, and packed documents. All of it travels as one int32 tensor
``(batch, 1, rows, columns)``, so that it can be cached, compiled and copied like any mask; the
number of rows says what it holds:

=====  ===============  ==========================================================
rows   columns          meaning
=====  ===============  ==========================================================
0      keys             plain causal, the last query at the last key
1      keys             the first entry is the key position of query 0
2      keys             row 0: 1 for keys that are no padding; row 1 as above
3      documents + 1    packed documents: cumulative lengths, three times
=====  ===============  ==========================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import document_numbers
from dilated_attention_pytorch.runtime import recording, tracing

PLAIN, OFFSET, PADDED, PACKED = 0, 1, 2, 3


def plain_mask(batch_size: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """The mask of samples that fill the whole length, each one document, without a cache.

    As ``attention_mask`` of an adapted model it says what the model otherwise finds out by looking
    at positions, for which a GPU must be waited for, and which recording a CUDA graph forbids.

    Args:
        batch_size: Samples.
        tokens: Of each.
        device: That of the model.

    Returns:
        int32 ``(batch_size, 1, 0, tokens)``: it holds nothing but its shape.

    Raises:
        ValueError: If a size is not positive.
    """
    for name, value in (("batch_size", batch_size), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}.")
    return torch.empty(batch_size, 1, PLAIN, tokens, dtype=torch.int32, device=device)


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """Builds the mask of a forward pass; transformers calls it.

    Args:
        batch_size: Samples.
        q_length: Query tokens.
        kv_length: Key tokens.
        q_offset: Position of query 0; a tensor with static caches.
        kv_offset: Position of key 0.
        mask_function: The token rule, by position.
        attention_mask: ``(batch, tokens)`` booleans, False for padding, or None.
        local_size: Sliding window: the layers that have one are left to PyTorch's attention.
        use_vmap: Set by transformers for rules that users added.
        device: Where to build it.
        **others: For PyTorch's attention.

    Returns:
        The compact mask, or, with ``local_size``, what PyTorch's attention takes.

    Raises:
        ValueError: If the rule is anything but causal attention within documents.
    """
    if local_size is not None:
        result: Tensor | None = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            local_size=local_size, use_vmap=use_vmap, device=device, **others,
        )  # fmt: skip
        return result
    if use_vmap:
        raise ValueError(
            "block-sparse attention takes no mask function of one's own (or_mask_function, "
            "and_mask_function): only causal masks, padding and packed documents."
        )
    if mask_function is not causal_mask_function:
        return _packed(batch_size, q_length, kv_length, mask_function, device)
    padding = _padding(attention_mask, kv_length, kv_offset)
    if padding is None and not isinstance(q_offset, Tensor):
        offset = q_offset - kv_offset
        if offset == kv_length - q_length:
            return plain_mask(batch_size, kv_length, device)
    first = torch.zeros(batch_size, 1, 1, kv_length, dtype=torch.int32, device=device)
    first = first + (q_offset - kv_offset)
    if padding is None:
        return first.int()
    valid = padding.to(device=device, dtype=torch.int32).expand(batch_size, -1)
    return torch.cat([valid[:, None, None], first.int()], 2)


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Validity of every key, or None if all that were given are valid."""
    if attention_mask is None or (not tracing() and bool(attention_mask.all())):
        return None
    attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    # A static cache has room for more keys than there are tokens yet.
    return F.pad(attention_mask, (0, kv_length - attention_mask.shape[1]))


def _packed(
    batch: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    device: torch.device | str,
) -> Tensor:
    """Finds the documents by asking the rule about neighbours: linear in the tokens."""
    if recording():
        raise ValueError(
            "attention_mask must be given while a CUDA graph is recorded, as nothing can be looked "
            "at to see whether documents are packed: plain_mask(batch, tokens, device) of "
            "dilated_attention_pytorch.hf if every sample is one document "
            "without padding; other inputs cannot be recorded."
        )
    sample = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    here = torch.arange(1, kv_length, device=device)[None]
    joined = mask_function(sample, head, here, here - 1).expand(batch, -1)
    if q_length != kv_length or bool(mask_function(sample, head, here - 1, here).any()):
        raise ValueError(
            "block-sparse attention takes causal masks, padding and packed documents; the model "
            "asked for another rule."
        )
    fresh = F.pad(~joined, (1, 0), value=True)
    position = torch.arange(kv_length, device=device)
    starts = torch.where(fresh, position, kv_length).sort(-1).values
    documents = int(fresh.sum(1).max())
    edges = F.pad(starts[:, :documents], (0, 1), value=kv_length).int()
    return edges[:, None, None].expand(-1, 1, PACKED, -1)


def is_compact(mask: Any, batch: int, kv_len: int) -> bool:
    """Whether a mask is one of :func:`compact_mask` for these keys."""
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.int32
        and mask.dim() == 4
        and mask.shape[0] == batch
        and mask.shape[2] <= PACKED
        and (mask.shape[2] == PACKED or mask.shape[3] == kv_len)
    )


def check_compact(mask: Any, batch: int, kv_len: int) -> Tensor:
    """Returns the mask if it is a compact one for these keys.

    Raises:
        ValueError: If it is anything else.
    """
    if not is_compact(mask, batch, kv_len):
        shown = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else mask
        raise ValueError(
            "attention_mask must be None or (batch, tokens) with 0 for padding: block-sparse "
            f"attention takes no mask of single pairs of tokens, got {shown}."
        )
    return mask


def token_mask(mask: Tensor, q_len: int, kv_len: int) -> Tensor | None:
    """The compact mask as booleans ``(batch, 1, q_len, kv_len)`` for PyTorch's attention.

    None where its ``is_causal`` says the same.
    """
    kind, batch, device = mask.shape[2], mask.shape[0], mask.device
    if kind == PLAIN and q_len in (1, kv_len):
        return None
    offset: int | Tensor = kv_len - q_len
    documents = None
    if kind in (OFFSET, PADDED):
        offset = mask[:, 0, -1, 0]
    if kind == PACKED:
        documents = document_numbers(mask[:, 0, 0], batch, kv_len, device)
    rule = AttentionMask(q_len, kv_len, True, offset, document_ids=documents)
    rows = torch.arange(q_len, device=device).view(1, 1, -1, 1)
    columns = torch.arange(kv_len, device=device).view(1, 1, 1, -1)
    seen = rule.tokens(rows, columns)
    if kind == PADDED:
        seen = seen & mask[:, :, :1].bool()
    return seen.expand(batch, 1, q_len, kv_len)


@dataclass(frozen=True, eq=False)
class CompactTokens:
    """Where tokens go so that padding stands at the end, and where the queries then begin.

    A cache of six slots whose first two hold padding (-), and two queries::

        given    keys - - a b c d      queries at 4: c d
        compact  keys a b c d - -      queries at 2: c d      4 keys

    Real tokens keep their order, so causal attention is the same; blocks are cut as if the sample
    had no padding.

    Attributes:
        key_order: ``(batch, kv_len)`` given position of each compact key.
        query_order: ``(batch, q_len)`` the same for queries.
        query_place: ``(batch, q_len)`` compact position of each given query.
        query_valid: ``(batch, q_len)`` booleans: given queries that are no padding.
        key_lengths: ``(batch,)`` int32: keys that are no padding.
        query_offset: ``(batch,)`` int32: compact key position of the first compact query.
    """

    key_order: Tensor
    query_order: Tensor
    query_place: Tensor
    query_valid: Tensor
    key_lengths: Tensor
    query_offset: Tensor

    @classmethod
    def of(cls, valid: Tensor, offset: Tensor, q_len: int) -> CompactTokens:
        """Plans the order. Does not wait for the device.

        Args:
            valid: ``(batch, kv_len)`` booleans: keys that are no padding.
            offset: ``(batch,)`` key position of query 0.
            q_len: Query tokens.
        """
        kv_len = valid.shape[1]
        position = torch.arange(kv_len, device=valid.device)
        past = position < offset[:, None]
        slots = offset[:, None].long() + torch.arange(q_len, device=valid.device)
        query_valid = valid.gather(1, slots.clamp(max=kv_len - 1))
        key_order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        query_order = (~query_valid).to(torch.uint8).argsort(dim=1, stable=True)
        return cls(
            key_order,
            query_order,
            query_order.argsort(dim=1),
            query_valid,
            valid.sum(1, dtype=torch.int32),
            (valid & past).sum(1, dtype=torch.int32),
        )

    @property
    def query_lengths(self) -> Tensor:
        """``(batch,)`` int32: queries that are no padding."""
        return self.query_valid.sum(1, dtype=torch.int32)

    def compact(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moves padding of ``(batch, tokens, heads, head_dim)`` tensors to the end."""
        return (
            _reorder(query, self.query_order),
            _reorder(key, self.key_order),
            _reorder(value, self.key_order),
        )

    def spread(self, out: Tensor) -> Tensor:
        """Moves the output back; padding gives 0."""
        return torch.where(self.query_valid[..., None, None], _reorder(out, self.query_place), 0)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None, None].expand(-1, -1, *x.shape[2:]))


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
            # One of both is there.
            seen = before.new_ones(len(before), self.end)  # type: ignore[union-attr, arg-type]
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
