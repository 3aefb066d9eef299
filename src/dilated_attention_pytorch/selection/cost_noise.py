"""How far measured costs can be trusted."""

from __future__ import annotations

from collections.abc import Collection
from statistics import mean, pstdev

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
