"""Takes the noise out of measured costs, so that budgets are not shared by chance."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from itertools import accumulate
from statistics import mean, pvariance
from typing import TypeVar

Unit = TypeVar("Unit", bound=Hashable)
# With fewer layers or heads their spread says too little about noise.
FEWEST = 8


def without_noise(
    costs: Mapping[Unit, tuple[float, ...]],
) -> tuple[dict[Unit, tuple[float, ...]], float]:
    """Draws the costs of all layers or heads together as far as their noise demands.

    Low sparsities cost less than a measurement of a few windows can tell; the best shares of such
    costs are those of the luckiest errors. So every curve is held against the mean curve of all
    times a factor of its own, which the large costs determine. At the lowest sparsity the rest
    counts as noise; of the rest at the others the part of the variance beyond that noise is kept
    (empirical Bayes; Efron and Morris 1973).

    Args:
        costs: By layer or head, by ascending sparsity.

    Returns:
        Likewise, and the noise of a single cost (a standard deviation). Fewer than eight layers or
        heads come back as they are, with 0.
    """
    if len(costs) < FEWEST:
        return dict(costs), 0.0
    columns = list(zip(*costs.values(), strict=True))
    common = list(accumulate((max(mean(column), 0.0) for column in columns), max))
    square = sum(x * x for x in common)
    nearby: dict[Unit, list[float]] = {}
    for unit, own in costs.items():
        factor = sum(x * y for x, y in zip(common, own, strict=True)) / square if square else 0.0
        nearby[unit] = [max(factor, 0.0) * x for x in common]
    spread = [
        pvariance([own[i] - nearby[unit][i] for unit, own in costs.items()])
        for i in range(len(columns))
    ]
    kept = [1.0 if not x else max(0.0, 1 - spread[0] / x) for x in spread]
    found = {
        unit: tuple(
            near + share * (value - near)
            for near, value, share in zip(nearby[unit], own, kept, strict=True)
        )
        for unit, own in costs.items()
    }
    return found, math.sqrt(spread[0])
