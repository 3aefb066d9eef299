"""Shares one budget among layers by what sparsity costs in each of them.

Budgets that differ between layers are known from caches of keys and values (PyramidKV, arXiv
2406.02069; SqueezeAttention, arXiv 2404.04793), which set them by rules; here they come from the
loss that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dilated_attention_pytorch.config import check_sparsity


@dataclass(frozen=True)
class LayerCosts:
    """What sparsity costs in each layer, measured one layer at a time.

    Attributes:
        length: Tokens of the sequences that they were measured on.
        sparsities: At which they were measured, ascending, in (0, 1).
        costs: By layer, one per sparsity: the loss with it in that layer minus the loss without,
            in nats per token.
    """

    length: int
    sparsities: tuple[float, ...]
    costs: Mapping[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: If sparsities do not ascend in (0, 1), or a layer has another number of
                costs, or the length is not positive.
        """
        if self.length < 1:
            raise ValueError(f"length must be positive, got {self.length}.")
        if not self.sparsities or list(self.sparsities) != sorted(set(self.sparsities)):
            raise ValueError(f"sparsities must ascend, got {self.sparsities}.")
        for value in self.sparsities:
            check_sparsity("sparsities", value)
        if self.sparsities[0] == 0:
            raise ValueError("sparsities must be positive: 0 costs nothing by definition.")
        for layer, costs in self.costs.items():
            if len(costs) != len(self.sparsities):
                raise ValueError(
                    f"costs of layer {layer} must be {len(self.sparsities)} numbers, one per "
                    f"sparsity, got {len(costs)}."
                )

    def allot(self, sparsity: float) -> dict[int, float]:
        """Sparsities of the layers with that mean, at which the sum of the costs is least.

        Costs count as straight lines between the measured sparsities, from 0 at 0; where they
        would bend downwards, which a measurement's noise makes of them, they are bridged. The best
        shares of such costs are found exactly: every next bit of sparsity goes to the layer where
        it costs least. A mean above the largest measured sparsity is the same for all layers.

        Args:
            sparsity: Mean over the layers, in [0, 1).

        Returns:
            The sparsity by layer.

        Example:
            >>> costs = LayerCosts(8192, (0.5, 0.9), {0: (0.0, 0.1), 1: (0.1, 1.0)})
            >>> {layer: round(value, 3) for layer, value in costs.allot(0.7).items()}
            {0: 0.9, 1: 0.5}
        """
        check_sparsity("sparsity", sparsity)
        if sparsity > self.sparsities[-1]:
            return dict.fromkeys(self.costs, sparsity)
        left = sparsity * len(self.costs)
        out = dict.fromkeys(self.costs, 0.0)
        steps = [
            (slope, start, layer, width)
            for layer, costs in self.costs.items()
            for slope, start, width in _convex_steps((0.0, *self.sparsities), (0.0, *costs))
        ]
        steps.sort()
        position = 0
        while left > 0 and position < len(steps):
            # Layers that cost the same share what is left.
            alike = [steps[position]]
            while position + len(alike) < len(steps) and (
                steps[position + len(alike)][0] == alike[0][0]
            ):
                alike.append(steps[position + len(alike)])
            position += len(alike)
            width = sum(step[3] for step in alike)
            share = min(1.0, left / width)
            for _, _, layer, part in alike:
                out[layer] += share * part
            left -= share * width
        return out

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        costs = {str(layer): list(values) for layer, values in self.costs.items()}
        return {"length": self.length, "sparsities": list(self.sparsities), "costs": costs}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerCosts:
        """Builds them from :meth:`to_dict`'s result."""
        costs = {int(layer): tuple(map(float, x)) for layer, x in values["costs"].items()}
        return cls(int(values["length"]), tuple(map(float, values["sparsities"])), costs)


def costs_near(costs: Iterable[LayerCosts], length: int) -> LayerCosts | None:
    r"""The costs that were measured nearest to a length; None beyond a factor of :math:`\sqrt 2`.

    What sparsity costs depends on how many blocks are left: shares of 8,192 tokens are worse than
    equal ones at 4,096 (``docs/log.md``).
    """
    near = [(abs(math.log2(length / one.length)), one) for one in costs]
    distance, found = min(near, key=lambda pair: pair[0], default=(math.inf, None))
    return found if distance <= 0.5 else None


def _convex_steps(x: tuple[float, ...], y: tuple[float, ...]) -> list[tuple[float, float, float]]:
    """The lower convex hull of points: slope, start and width of its steps, from left to right."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(max(_slope(a, b), 0.0), a[0], b[0] - a[0]) for a, b in pairwise(hull)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
