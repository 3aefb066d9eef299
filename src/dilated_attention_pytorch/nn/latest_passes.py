"""What was in force in the latest forward passes, for those that a backward pass runs again."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

# More micro-batches than are under way at once.
_MOST = 64


class LatestPasses:
    """Numbers of forward passes, found again by their queries.

    Activation checkpointing runs a pass a second time, after other passes have come in between,
    and says not which one it is; its queries are the same. Copies and pickles hold none.
    """

    def __init__(self) -> None:
        self._passes: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MOST)

    def note(self, query: Tensor, numbers: Tensor) -> None:
        """Keeps the numbers of a pass; only the latest 64 passes are kept."""
        self._passes.append((_mark(query), numbers))

    def find(self, query: Tensor) -> Tensor | None:
        """The numbers of the pass with these queries; None if there was no pass.

        Without a wait for the device.
        """
        if not self._passes:
            return None
        marks, numbers = (torch.stack(x) for x in zip(*self._passes, strict=True))
        nearest = (marks - _mark(query)).abs().argmin().view(1)
        return numbers.index_select(0, nearest)[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return LatestPasses, ()


def _mark(query: Tensor) -> Tensor:
    return query.detach().nansum(dtype=torch.float64)
