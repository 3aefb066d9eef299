"""Sharing a budget among layers: the mean is met, and no other shares cost less."""

from __future__ import annotations

import random

import pytest

from cost_lines import price
from dilated_attention_pytorch.selection.layer_shares import (
    SparsityCosts,
    costs_near,
)

GRID = (0.3, 0.6, 0.8, 0.9)


def random_costs(seed: int, layers: int = 5) -> SparsityCosts:
    draw = random.Random(seed)
    found = {}
    for layer in range(layers):
        slope, height, before = 0.0, 0.0, 0.0
        costs = []
        for x in GRID:
            slope += draw.random()
            height += slope * (x - before)
            before = x
            costs.append(height)
        found[layer] = tuple(costs)
    return SparsityCosts(4096, GRID, found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mean", [0.0, 0.25, 0.55, 0.75, 0.9])
def test_mean_is_met_and_no_exchange_between_layers_is_cheaper(seed: int, mean: float) -> None:
    costs = random_costs(seed)
    shares = costs.allot(mean)
    assert sum(shares.values()) / len(shares) == pytest.approx(mean)
    assert all(0 <= value <= GRID[-1] + 1e-12 for value in shares.values())
    least = price(costs, shares)
    assert costs.price(shares) == pytest.approx(least)
    for a in shares:
        for b in shares:
            step = min(0.01, shares[a], GRID[-1] - shares[b])
            if a != b and step > 0:
                moved = {**shares, a: shares[a] - step, b: shares[b] + step}
                assert price(costs, moved) >= least - 1e-12


def test_layers_that_cost_the_same_get_the_same() -> None:
    costs = SparsityCosts(4096, (0.5, 0.9), dict.fromkeys(range(3), (0.1, 0.4)))
    assert costs.allot(0.7) == pytest.approx(dict.fromkeys(range(3), 0.7))


def test_noise_that_bends_costs_downwards_is_bridged() -> None:
    # Read literally, layer 0 would cost less at 0.6 than at 0.3.
    bent = SparsityCosts(4096, (0.3, 0.6, 0.9), {0: (0.5, 0.2, 0.9), 1: (0.1, 0.2, 0.9)})
    straight = SparsityCosts(4096, (0.3, 0.6, 0.9), {0: (0.1, 0.2, 0.9), 1: (0.1, 0.2, 0.9)})
    assert bent.allot(0.5) == pytest.approx(straight.allot(0.5))
    negative = SparsityCosts(4096, (0.3, 0.6, 0.9), {0: (-0.1, -0.2, -0.1), 1: (0.1, 0.2, 0.9)})
    assert negative.allot(0.45) == pytest.approx({0: 0.9, 1: 0.0})


def test_beyond_what_was_measured_all_layers_get_the_mean() -> None:
    assert random_costs(0).allot(0.95) == dict.fromkeys(range(5), 0.95)


def test_plain_values_give_the_same_costs() -> None:
    costs = random_costs(1)
    assert SparsityCosts.from_dict(costs.to_dict()) == costs


@pytest.mark.parametrize(
    ("sparsities", "costs", "words"),
    [
        ((0.9, 0.5), {0: (1.0, 1.0)}, "sparsities must ascend"),
        ((), {}, "sparsities must ascend"),
        ((0.0, 0.5), {0: (1.0, 1.0)}, "sparsities must be positive"),
        ((0.5, 1.0), {0: (1.0, 1.0)}, "sparsities"),
        ((0.5, 0.9), {3: (1.0,)}, "costs of 3 must be 2 numbers"),
    ],
)
def test_bad_costs_are_refused(
    sparsities: tuple[float, ...], costs: dict[int, tuple[float, ...]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        SparsityCosts(4096, sparsities, costs)


def test_costs_serve_lengths_near_theirs_alone() -> None:
    short, long = (SparsityCosts(n, (0.5,), {0: (0.1,)}) for n in (2048, 8192))
    assert costs_near((short, long), 8192) is long
    assert costs_near((short, long), 6000) is long
    assert costs_near((short, long), 2800) is short
    assert costs_near((short, long), 4096) is None
    assert costs_near((short, long), 32768) is None
    assert costs_near((), 2048) is None


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be positive, got 0"):
        SparsityCosts(0, (0.5,), {0: (0.1,)})
