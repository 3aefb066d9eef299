"""Buffers that keep their precision whatever a model is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose own buffers move with it but are never cast.

    They are settings and measurements, not weights: 0.9 in bfloat16 is 0.8984.
    """

    def initial_buffers(self) -> dict[str, Tensor]:
        """What buffers hold that got memory without values (``meta``, ``to_empty``), by name."""
        return {}

    def writable(self, name: str) -> Tensor:
        """One of the buffers, to be set from outside.

        Raises:
            RuntimeError: If it is on the meta device, where nothing can be written.
        """
        buffer = self.get_buffer(name)
        if buffer.is_meta:
            raise RuntimeError(
                f"{name} is on the meta device, where nothing can be written; set it before the "
                "model is offloaded, or offload without offload_buffers=True; a model that was "
                "made on the meta device needs memory first (to_empty)."
            )
        return buffer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None:
                continue
            if old.is_meta and not new.is_meta:
                value = self.initial_buffers().get(name, new)
                self._buffers[name] = value.to(new.device, old.dtype)
            elif new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = dict(state_dict)
        for name, own in self._buffers.items():
            saved = given.get(prefix + name)
            if own is not None and isinstance(saved, Tensor):
                given[prefix + name] = _widened(saved, own.dtype)
        super()._load_from_state_dict(given, prefix, *args, **kwargs)


def _widened(saved: Tensor, dtype: torch.dtype) -> Tensor:
    """A saved buffer in its own dtype; of a number that was cast, what it was set to.

    That is the shortest decimal number that is cast to it: 0.9 of 0.8984 in bfloat16.
    """
    cast = saved.is_floating_point() and torch.finfo(saved.dtype).bits < torch.finfo(dtype).bits
    if not cast or saved.dim() or saved.is_meta or not saved.isfinite():
        return saved.to(dtype)
    exact = float(saved)
    decimals = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    shortest = next(
        x for x in decimals if torch.tensor(x, dtype=saved.dtype, device="cpu") == exact
    )
    return torch.tensor(shortest, dtype=dtype, device=saved.device)
