"""Brings the masks of ``nn.MultiheadAttention`` to lengths, the form that blocks understand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyPadding:
    """Padding anywhere in a sequence, and the order that moves it to the end.

    With padding (-) on the left and inside::

        given    - - a b - c
        compact  a b c - - -      order 2 3 5 0 1 4, length 3

    Real tokens keep their order, so causal attention over the compact sequence is the same.

    Attributes:
        order: ``(batch, kv_len)`` given position of each compact token.
        place: ``(batch, kv_len)`` compact position of each given token.
        lengths: ``(batch,)`` real tokens.
    """

    order: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, hidden: Tensor, batch: int, kv_len: int, device: torch.device) -> KeyPadding:
        """Plans the order. Does not wait for the device.

        Args:
            hidden: ``(batch, kv_len)`` booleans, True for padding.
            batch: Samples of ``key``.
            kv_len: Tokens of ``key``.
            device: Where ``key`` is.

        Raises:
            ValueError: If shape or device do not fit.
        """
        if tuple(hidden.shape) != (batch, kv_len):
            raise ValueError(
                f"key_padding_mask must be (batch, kv_len)=({batch}, {kv_len}), got "
                f"{tuple(hidden.shape)}."
            )
        if hidden.device != device:
            raise ValueError(f"key_padding_mask must be on {device}, got {hidden.device}.")
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
        """Moves tokens ``(batch, kv_len, dim)`` to their compact places; zeros are the padding."""
        places = torch.arange(x.shape[1], device=x.device)
        real = places < self.lengths[:, None]
        # A projection's weights see what padding holds, too, and 0 * nan in the backward pass is
        # nan.
        return torch.where(real[..., None], _reorder(x, self.order), 0)

    def spread(self, out: Tensor) -> Tensor:
        """Moves outputs ``(batch, kv_len, dim)`` back to the given positions."""
        return _reorder(out, self.place)

    def replace(self, out: Tensor, other: Tensor) -> Tensor:
        """Takes another tensor where padding is in ``(batch, kv_len, dim)``."""
        real = self.place < self.lengths[:, None]
        return torch.where(real[..., None], out, other)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def hidden_tokens(key_padding_mask: Tensor) -> Tensor:
    """Booleans of a padding mask: True for padding. Waits for the device if it is not boolean.

    Raises:
        TypeError: If the mask is neither boolean nor floating point.
        ValueError: If a floating-point mask holds anything but 0 and -inf.
    """
    return _hidden("key_padding_mask", key_padding_mask)


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
        TypeError: If the mask is neither boolean nor floating point.
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
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean or floating point, got {mask.dtype}.")
    hidden = mask == -torch.inf
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError(
            f"{name} must hold 0 (read) and -inf (hidden) only: other values would be added to "
            "the logits of single tokens, which block-sparse attention does not do."
        )
    return hidden
