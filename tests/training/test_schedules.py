"""Schedules by their ends, their shape and their direction."""

from __future__ import annotations

import math

import pytest

from dilated_attention_pytorch.training.schedules import SCHEDULES


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.1), (0.1, 2.0), (0.5, 0.5)])
def test_starts_at_the_start_and_ends_at_the_end(name: str, start: float, end: float) -> None:
    move = SCHEDULES[name]
    assert move(start, end, 0.0) == pytest.approx(start)
    assert move(start, end, 1.0) == pytest.approx(end)
    values = [move(start, end, t / 50) for t in range(51)]
    assert values == sorted(values, reverse=end < start)


def test_shapes() -> None:
    assert SCHEDULES["linear"](1.0, 0.2, 0.25) == pytest.approx(0.8)
    assert SCHEDULES["cosine"](1.0, 0.0, 0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert SCHEDULES["exponential"](1.0, 0.01, 0.5) == pytest.approx(0.1)
