"""Shares one budget among layers by what sparsity costs in each of them.

Budgets that differ between layers are known from caches of keys and values (PyramidKV, arXiv
2406.02069), which set them by rules; here they come from the loss that was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import mean, pstdev
from typing import Any

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.foreign_text import short_repr

# With fewer layers their spread says too little about noise.
FEWEST = 8


def noise_of(costs: Collection[tuple[float, ...]]) -> float:
    """The standard deviation of the error of a single cost, estimated from all of them.

    Sparsity costs every layer about the same curve times a factor of its own, next to
    nothing at the lowest sparsity that was measured. What the costs there have beyond that is taken
    for noise, real differences of single layers too: the estimate is rather too high than too low.

    Args:
        costs: One curve per layer, by ascending sparsity.

    Returns:
        The estimate; 0 for fewer than eight layers.
    """
    if len(costs) < FEWEST:
        return 0.0
    common = [mean(column) for column in zip(*costs, strict=True)]
    square = sum(x * x for x in common)
    rest = []
    for own in costs:
        factor = sum(x * y for x, y in zip(common, own, strict=True)) / square if square else 0.0
        rest.append(own[0] - factor * common[0])
    return pstdev(rest)


_LONGEST = 2**40
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")
# The slope and the width of each step of a convex curve that begins at 0.
Steps = list[tuple[float, float]]


@dataclass(frozen=True)
class SparsityCosts:
    """What sparsity costs in each layer, measured one at a time.

    Attributes:
        length: Tokens of the sequences that they were measured on.
        sparsities: At which they were measured, ascending, in (0, 1).
        costs: By layer, one per sparsity: the loss with it there minus the loss without, in nats
            per token.
    """

    length: int
    sparsities: tuple[float, ...]
    costs: Mapping[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: If sparsities do not ascend in (0, 1), a layer has another number of costs
                or one that is not finite, or the length is not positive.
        """
        if self.length < 1:
            raise ValueError(f"length must be positive, got {self.length}.")
        if not self.sparsities or list(self.sparsities) != sorted(set(self.sparsities)):
            raise ValueError(f"sparsities must ascend, got {self.sparsities}.")
        for value in self.sparsities:
            check_sparsity("sparsities", value)
        if self.sparsities[0] == 0:
            raise ValueError("sparsities must be positive: 0 costs nothing by definition.")
        if self.length > _LONGEST:
            raise ValueError(f"length must be at most 2**40, got {self.length}.")
        for layer, costs in self.costs.items():
            if not all(map(math.isfinite, costs)):
                raise ValueError(f"costs of {layer} must be finite, got {costs}.")
            if len(costs) != len(self.sparsities):
                raise ValueError(
                    f"costs of {layer} must be {len(self.sparsities)} numbers, one per "
                    f"sparsity, got {len(costs)}."
                )

    @property
    def noise(self) -> float:
        """Standard deviation of the error of a single cost, as far as the costs themselves show it.

        See :func:`~dilated_attention_pytorch.selection.layer_shares.noise_of`.
        """
        return noise_of(self.costs.values())

    def cheapest(self, sparsity: float) -> dict[int, float]:
        """Sparsities of the layers with that mean and the least sum of the costs.

        Costs count as straight lines between the measured sparsities, from 0 at 0; where they
        would bend downwards, which a measurement's noise makes of them, they are bridged. The best
        shares of such costs are found exactly: every next bit of sparsity goes where it costs
        least. A mean above the largest measured sparsity is the same for all.

        Args:
            sparsity: Mean over the layers, in [0, 1).

        Returns:
            The sparsity of each.
        """
        check_sparsity("sparsity", sparsity)
        if sparsity > self.sparsities[-1]:
            return dict.fromkeys(self.costs, sparsity)
        left = sparsity * len(self.costs)
        out = dict.fromkeys(self.costs, 0.0)
        steps = [
            (slope, layer, width) for layer, own in self._steps().items() for slope, width in own
        ]
        steps.sort(key=lambda step: step[0])
        for _, group in groupby(steps, key=lambda step: step[0]):
            # Those that cost the same share what is left.
            alike = list(group)
            width = sum(step[2] for step in alike)
            share = min(1.0, max(left, 0.0) / width)
            for _, layer, part in alike:
                out[layer] += share * part
            left -= share * width
        return out

    def price(self, shares: Mapping[int, float]) -> float:
        """The sum of the costs of such shares, on the lines of :meth:`cheapest`, in nats per token.

        Args:
            shares: Sparsity of each layer, at most the largest that was measured.
        """
        return sum(_height(own, shares[layer]) for layer, own in self._steps().items())

    def allot(self, sparsity: float) -> dict[int, float]:
        """The shares of :meth:`cheapest`, as near to equal ones as the noise of the costs allows.

        With eight layers or more the shares move towards equal ones, until the sum of the costs has
        grown by its noise (:attr:`noise`): where no shares are certainly better, all have the same.

        Args:
            sparsity: Mean over the layers, in [0, 1).

        Returns:
            The sparsity of each.

        Example:
            >>> costs = SparsityCosts(8192, (0.5, 0.9), {0: (0.0, 0.1), 1: (0.1, 1.0)})
            >>> {layer: round(value, 3) for layer, value in costs.allot(0.7).items()}
            {0: 0.9, 1: 0.5}
        """
        best = self.cheapest(sparsity)
        if sparsity > self.sparsities[-1]:
            return best
        # The noise of the sum over all of them.
        doubt = self.noise * math.sqrt(len(best))
        more = self.price(dict.fromkeys(best, sparsity)) - self.price(best)
        # The costs are convex: of a mixture they are at most the mixture of both.
        part = 1.0 if more <= doubt else doubt / more
        return {layer: own + part * (sparsity - own) for layer, own in best.items()}

    def _steps(self) -> dict[int, Steps]:
        return {
            layer: _convex_steps((0.0, *self.sparsities), (0.0, *costs))
            for layer, costs in self.costs.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        costs = {str(layer): list(values) for layer, values in self.costs.items()}
        return {"length": self.length, "sparsities": list(self.sparsities), "costs": costs}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityCosts:
        """Builds them from :meth:`to_dict`'s result.

        Raises:
            ValueError: If anything is missing, of another type, or out of range.
        """
        if not isinstance(values, Mapping) or set(values) != {"length", "sparsities", "costs"}:
            raise ValueError(
                f"costs must hold length, sparsities and costs, got {short_repr(values)}."
            )
        length, costs = values["length"], values["costs"]
        if type(length) is not int or not isinstance(costs, Mapping):
            raise ValueError(
                "costs must hold a whole length, and costs by layer, got "
                f"{short_repr(length)} and {short_repr(costs)}."
            )
        found = {_layer(name): _numbers(name, own) for name, own in costs.items()}
        return cls(length, _numbers("sparsities", values["sparsities"]), found)


def _layer(name: str) -> int:
    if not _LAYER.fullmatch(name):
        raise ValueError(f"a layer must be named by its number, got {short_repr(name)}.")
    return int(name)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not all(type(x) in (int, float) for x in values):
        raise ValueError(f"{short_repr(name)} must be numbers, got {short_repr(values)}.")
    return tuple(map(float, values))


def costs_near(costs: Iterable[SparsityCosts], length: int) -> SparsityCosts | None:
    r"""The costs that were measured nearest to a length; None beyond a factor of :math:`\sqrt 2`.

    What sparsity costs depends on how many blocks are left: shares of 8,192 tokens are worse than
    equal ones at 4,096 (``docs/log.md``).
    """
    near = [(abs(math.log2(length / one.length)), one) for one in costs]
    distance, found = min(near, key=lambda pair: pair[0], default=(math.inf, None))
    return found if distance <= 0.5 else None


def _height(steps: Steps, place: float) -> float:
    total = 0.0
    for slope, width in steps:
        total += slope * min(width, max(place, 0.0))
        place -= width
    return total


def _convex_steps(x: tuple[float, ...], y: tuple[float, ...]) -> Steps:
    """The lower convex hull of points: slope and width of its steps, from left to right."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(max(_slope(a, b), 0.0), b[0] - a[0]) for a, b in pairwise(hull)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
