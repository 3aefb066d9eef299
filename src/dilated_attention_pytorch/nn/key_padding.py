"""Brings the masks of ``nn.MultiheadAttention`` to lengths, the form that blocks understand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.runtime import FLOATS


@dataclass(frozen=True, eq=False)
class KeyPadding:
    """Padding anywhere in a sequence of keys or queries, and the order that moves it to the end.

    With padding (-) on the left and inside::

        given    - - a b - c
        compact  a b c - - -      order 2 3 5 0 1 4, length 3

    Real tokens keep their order, so causal attention over the compact sequence is the same.

    Attributes:
        order: ``(batch, length)`` given position of each compact token.
        place: ``(batch, length)`` compact position of each given token.
        lengths: ``(batch,)`` real tokens.
    """

    order: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, name: str, mask: Tensor, tokens: Tensor, batched: bool) -> KeyPadding:
        """Plans the order. Waits for the device if the mask is not boolean.

        Args:
            name: Of the mask, for errors.
            mask: ``(batch, length)``, ``(length,)`` without a batch; True or -inf for padding.
            tokens: ``(batch, length, dim)``: what it is a mask of.
            batched: Whether there is a batch; without one ``tokens`` hold one sample.

        Raises:
            TypeError: If the mask is no tensor, or neither boolean nor floating point.
            ValueError: If shape or device do not fit, or a floating-point mask holds anything but
                0 and -inf.
        """
        check_mask(name, mask)
        expected = tuple(tokens.shape[:2] if batched else tokens.shape[1:2])
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"{name} must be {expected}, {'(batch, length)' if batched else '(length,)'} of "
                f"what it is a mask of, got {tuple(mask.shape)}."
            )
        if mask.device != tokens.device:
            raise ValueError(f"{name} must be on {tokens.device}, got {mask.device}.")
        hidden = _hidden(name, mask if batched else mask[None])
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        return cls(order, order.argsort(dim=1), (~hidden).sum(1, dtype=torch.int32))

    def require_at_the_end(self) -> None:
        """Raises ValueError if padding stands elsewhere. Waits for the device."""
        at_the_end = self.place == torch.arange(self.place.shape[1], device=self.place.device)
        if not bool(at_the_end.all()):
            raise ValueError(
                "key_padding_mask must mark tokens at the end when is_causal aligns fewer or more "
                "queries with the keys: moving padding there would move the keys past the queries."
            )

    def compact(
        self, key: Tensor, query: Tensor, value: Tensor, one_sequence: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moves padding to the end of ``(batch, kv_len, dim)``, where zeros take its place.

        Equal inputs stay one tensor.

        Args:
            key: Keys.
            query: Queries; moved along if they are of the same sequence.
            value: Values.
            one_sequence: Whether they are.

        Returns:
            Key, query and value.
        """
        moved = self.move(key)
        if one_sequence:
            query = moved if query is key else self.move(query)
        value = moved if value is key else self.move(value)
        return moved, query, value

    def of_queries(self, query: Tensor, key: Tensor) -> KeyPadding:
        """Plans for the queries: as for the keys in samples where they hold the same numbers.

        Those are one sequence, whatever objects it came in. Elsewhere the queries are another
        sequence, of which nothing is known to be padding. Does not wait for the device.

        Args:
            query: ``(batch, kv_len, dim)``, before anything has moved.
            key: Likewise.
        """
        same = (query == key) | (query.isnan() & key.isnan())
        own, length = same.flatten(1).all(1), key.shape[1]
        given = torch.arange(length, device=key.device)
        return KeyPadding(
            torch.where(own[:, None], self.order, given),
            torch.where(own[:, None], self.place, given),
            torch.where(own, self.lengths, length),
        )

    def move(self, x: Tensor) -> Tensor:
        """Moves tokens ``(batch, length, dim)`` to their compact places; zeros are the padding."""
        places = torch.arange(x.shape[1], device=x.device)
        real = places < self.lengths[:, None]
        # A projection's weights see what padding holds, too, and 0 * nan in the backward pass is
        # nan.
        return torch.where(real[..., None], _reorder(x, self.order), 0)

    def spread(self, out: Tensor) -> Tensor:
        """Moves outputs ``(batch, length, dim)`` back to the given positions."""
        return _reorder(out, self.place)

    def replace(self, out: Tensor, other: Tensor) -> Tensor:
        """Takes another tensor where padding is in ``(batch, length, dim)``."""
        real = self.place < self.lengths[:, None]
        return torch.where(real[..., None], out, other)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def check_mask(name: str, mask: object) -> None:
    """Checks that a mask is a tensor of booleans or of floating-point numbers.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}.")
    if mask.dtype not in (torch.bool, *FLOATS):
        raise TypeError(
            f"{name} must be boolean or floating point (float16, bfloat16, float32 or float64), "
            f"got {mask.dtype}."
        )


def is_causal_mask(attn_mask: Tensor, q_len: int, kv_len: int, batch_heads: int) -> bool:
    """Accepts the causal mask, aligned bottom-right, and nothing else. Waits for the device.

    Args:
        attn_mask: ``(q_len, kv_len)`` or ``(batch_heads, q_len, kv_len)``: True or -inf hides.
        q_len: Query tokens.
        kv_len: Key tokens.
        batch_heads: Samples times heads.

    Returns:
        True.

    Raises:
        ValueError: If it has another shape or hides anything else.
    """
    if tuple(attn_mask.shape) not in ((q_len, kv_len), (batch_heads, q_len, kv_len)):
        raise ValueError(
            f"attn_mask must be ({q_len}, {kv_len}) or ({batch_heads}, {q_len}, {kv_len}), got "
            f"{tuple(attn_mask.shape)}."
        )
    hidden = _hidden("attn_mask", attn_mask)
    later = torch.ones(q_len, kv_len, dtype=torch.bool, device=hidden.device)
    if not bool((hidden == later.triu(kv_len - q_len + 1)).all()):
        raise ValueError(
            "attn_mask must be None or the causal mask (aligned bottom-right): which tokens may "
            "be read is chosen by blocks. Use key_padding_mask for padding and cu_seqlens for "
            "documents."
        )
    return True


def _hidden(name: str, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    hidden = mask == -torch.inf
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError(
            f"{name} must hold 0 (read) and -inf (hidden) only: other values would be added to "
            "the logits of single tokens, which block-sparse attention does not do."
        )
    return hidden
