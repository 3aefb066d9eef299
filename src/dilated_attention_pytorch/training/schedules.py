"""How a value moves from its start to its end over a number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float, float, float], float]


def linear(start: float, end: float, progress: float) -> float:
    """A straight line."""
    return start + (end - start) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine: slow at both ends."""
    return linear(start, end, 0.5 * (1 - math.cos(math.pi * progress)))


def exponential(start: float, end: float, progress: float) -> float:
    """A constant factor per step; both ends must be positive."""
    # Not by their quotient, which need not be a finite number.
    return math.exp(linear(math.log(start), math.log(end), progress))


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine, "exponential": exponential}
