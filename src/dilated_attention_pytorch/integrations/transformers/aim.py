"""Looks for the sparsity to calibrate thresholds at, so that the wanted one comes out elsewhere."""

from __future__ import annotations

from collections.abc import Callable

# Calibrations at most, the first one included.
MOST_TRIES = 7


def find_aim(
    measure: Callable[[float], float], sparsity: float, tolerance: float
) -> tuple[float, float]:
    """Tries aims until the measured sparsity is the wanted one or little above it.

    Thresholds that are calibrated on some windows leave out more or less on others. At first the
    measured sparsity is taken to follow the aim one to one; then aims lie on the line through the
    nearest below and the nearest above. Where forced blocks prevent the sparsity, so that a higher
    aim changes nothing, it is missed by as little as can be.

    Args:
        measure: Calibrates for an aim and returns the sparsity that comes out.
        sparsity: The wanted one, in [0, 1).
        tolerance: By how much it may be exceeded, positive; it may not be fallen short of.

    Returns:
        The best aim that was tried, and the sparsity that came out.

    Example:
        >>> aim, found = find_aim(lambda aim: aim - 0.04, 0.9, 0.005)
        >>> round(aim, 4), round(found, 4)
        (0.9425, 0.9025)
    """
    tries: list[tuple[float, float]] = []
    aim = sparsity
    while not tries or not 0 <= tries[-1][1] <= tolerance:
        stuck = len(tries) > 1 and tries[-1][1] == tries[-2][1] < 0
        if stuck or len(tries) == MOST_TRIES or any(aim == tried for tried, _ in tries):
            break
        tries.append((aim, measure(aim) - sparsity))
        aim = _next(tries, tolerance)
    best = min(tries, key=lambda tried: (tried[1] < 0, abs(tried[1])))
    return best[0], best[1] + sparsity


def _next(tries: list[tuple[float, float]], tolerance: float) -> float:
    """Where the excess over the wanted sparsity should be half the tolerance.

    Args:
        tries: Aims and their excesses.
        tolerance: Of :func:`find_aim`.
    """
    below = [point for point in tries if point[1] < 0]
    above = [point for point in tries if point[1] >= 0]
    points = tries[-2:]
    if below and above:
        # Of those that miss by as much the ones whose aims lie closest together.
        points = [max(below, key=lambda p: (p[1], p[0])), min(above, key=lambda p: (p[1], p[0]))]
    aim, excess = points[-1]
    slope = 1.0
    if len(points) == 2:
        # No aim is tried twice.
        (x, low), (y, high) = points
        slope = min(max((high - low) / (y - x), 0.3), 3.0)
    return min(max(aim + (tolerance / 2 - excess) / slope, 0.0), 0.999)
