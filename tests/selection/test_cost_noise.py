"""Costs without their noise: what is known exactly stays, and shares are not drawn by lot."""

from __future__ import annotations

import math
import random
from statistics import mean

import pytest

from dilated_attention_pytorch.selection.cost_noise import without_noise
from dilated_attention_pytorch.selection.cost_shares import SparsityCosts

GRID = (0.5, 0.7, 0.8, 0.86, 0.9, 0.93, 0.95, 0.96)
# Much as of a layer of SmolLM2 (nats per token).
COMMON = tuple(0.02 * math.exp(28 * (x - GRID[-1])) for x in GRID)


def true_costs(seed: int, layers: int = 30) -> dict[int, tuple[float, ...]]:
    draw = random.Random(seed)
    scales = [draw.choice((0.2, 0.7, 1.0, 3.0)) for _ in range(layers)]
    return {layer: tuple(scale * x for x in COMMON) for layer, scale in enumerate(scales)}


def measured(
    costs: dict[int, tuple[float, ...]], noise: float, seed: int
) -> dict[int, tuple[float, ...]]:
    draw = random.Random(seed)
    return {
        layer: tuple(x + draw.gauss(0, noise) for x in values) for layer, values in costs.items()
    }


def price(costs: dict[int, tuple[float, ...]], shares: dict[int, float]) -> float:
    total = 0.0
    for layer, share in shares.items():
        before = (0.0, 0.0)
        for point in zip(GRID, costs[layer], strict=True):
            if share <= point[0] + 1e-12:
                slope = (point[1] - before[1]) / (point[0] - before[0])
                total += before[1] + slope * (share - before[0])
                break
            before = point
    return total


def by_luck(costs: dict[int, tuple[float, ...]], sparsity: float) -> dict[int, float]:
    """The best shares of the costs as they were measured, a few layers at a time."""
    out = {}
    for start in range(0, len(costs), 6):
        part = {layer: costs[layer] for layer in range(start, start + 6)}
        out |= SparsityCosts(8192, GRID, part).allot(sparsity)
    return out


def test_costs_that_are_one_curve_times_a_factor_stay_as_they_are() -> None:
    costs = true_costs(0)
    found, noise = without_noise(costs)
    assert noise == pytest.approx(0, abs=1e-12)
    for layer, values in costs.items():
        assert found[layer] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_back_is_nearer_to_the_truth(seed: int) -> None:
    costs = true_costs(seed)
    noisy = measured(costs, 0.0003, seed)
    found, noise = without_noise(noisy)
    assert noise == pytest.approx(0.0003, rel=0.4)

    def error(of: dict[int, tuple[float, ...]]) -> float:
        pairs = [zip(of[layer], costs[layer], strict=True) for layer in costs]
        return mean((a - b) ** 2 for pair in pairs for a, b in pair)

    assert error(found) < 0.6 * error(noisy)


def test_a_layer_unlike_the_others_stays_so_where_it_stands_out_of_the_noise() -> None:
    costs = true_costs(1)
    costs[4] = (*COMMON[:4], 0.03, 0.04, 0.05, 0.06)
    found, _ = without_noise(measured(costs, 0.0003, 5))
    assert found[4][4] > 0.02


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.8, 0.9])
def test_shares_cost_less_in_truth_than_those_of_the_noise(sparsity: float) -> None:
    """On average over 20 measurements, and never much more than equal shares."""
    costs = true_costs(3)
    equal = price(costs, dict.fromkeys(costs, sparsity))
    own, lucky = [], []
    for seed in range(20):
        noisy = measured(costs, 0.0003, seed)
        shares = SparsityCosts(8192, GRID, noisy).allot(sparsity)
        assert sum(shares.values()) / len(shares) == pytest.approx(sparsity)
        own.append(price(costs, shares))
        lucky.append(price(costs, by_luck(noisy, sparsity)))
    assert mean(own) < mean(lucky)
    assert max(own) < equal + 0.0005
    if sparsity == 0.9:
        assert mean(own) < 0.9 * equal


def test_where_nothing_stands_out_shares_are_equal() -> None:
    noisy = measured(dict.fromkeys(range(30), (0.0,) * len(GRID)), 0.001, 0)
    assert SparsityCosts(8192, GRID, noisy).allot(0.8) == pytest.approx(
        dict.fromkeys(range(30), 0.8)
    )


def test_of_few_layers_nothing_is_known_of_the_noise() -> None:
    costs = measured(true_costs(0, layers=7), 0.0003, 0)
    assert without_noise(costs) == (costs, 0.0)
