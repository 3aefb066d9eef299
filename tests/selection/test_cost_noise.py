"""The noise of measured costs, and shares that are not drawn by lot."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from statistics import mean

import pytest

from cost_lines import price
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts, noise_of

GRID = (0.5, 0.7, 0.8, 0.86, 0.9, 0.93, 0.95, 0.96)
# Much as of a layer of SmolLM2 (nats per token).
COMMON = tuple(0.02 * math.exp(28 * (x - GRID[-1])) for x in GRID)


def true_costs(seed: int, layers: int = 30) -> dict[int, tuple[float, ...]]:
    draw = random.Random(seed)
    scales = [draw.choice((0.2, 0.7, 1.0, 3.0)) for _ in range(layers)]
    return {layer: tuple(scale * x for x in COMMON) for layer, scale in enumerate(scales)}


def measured(
    costs: Mapping[int, tuple[float, ...]], noise: float, seed: int
) -> dict[int, tuple[float, ...]]:
    draw = random.Random(seed)
    return {
        layer: tuple(x + draw.gauss(0, noise) for x in values) for layer, values in costs.items()
    }


def test_costs_that_are_one_curve_times_a_factor_have_no_noise() -> None:
    assert noise_of(true_costs(0).values()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0001, 0.001])
def test_noise_is_found(noise: float, seed: int) -> None:
    assert noise_of(measured(true_costs(seed), noise, seed).values()) == pytest.approx(
        noise, rel=0.4
    )


def test_of_few_layers_nothing_is_known_of_the_noise() -> None:
    assert noise_of(measured(true_costs(0, layers=7), 0.0003, 0).values()) == 0
    assert noise_of([(0.0, 0.0)] * 9) == 0


def test_exact_costs_are_shared_exactly() -> None:
    costs = SparsityCosts(8192, GRID, true_costs(2))
    assert costs.allot(0.9) == pytest.approx(costs.cheapest(0.9), abs=1e-9)


def test_shares_differ_only_as_far_as_the_noise_lets_them() -> None:
    true = SparsityCosts(8192, GRID, true_costs(3))
    for sparsity in (0.5, 0.9):
        equal = price(true, dict.fromkeys(true.costs, sparsity))
        found = []
        for seed in range(20):
            costs = SparsityCosts(8192, GRID, measured(true.costs, 0.0003, seed))
            shares, best = costs.allot(sparsity), costs.cheapest(sparsity)
            assert sum(shares.values()) / len(shares) == pytest.approx(sparsity)
            # The price of the move is the noise of the sum at most.
            assert costs.price(shares) <= costs.price(best) + costs.noise * 30**0.5 + 1e-12
            found.append((price(true, shares), _spread(shares), _spread(best)))
        paid, spread, by_luck = (mean(values) for values in zip(*found, strict=True))
        if sparsity == 0.5:
            # Nothing is to be gained there.
            assert paid < equal + 0.0002
            assert spread < 0.15 < by_luck
        else:
            assert paid < 0.9 * equal
            assert spread > 0.05


def test_where_nothing_stands_out_shares_are_nearly_equal() -> None:
    noisy = measured(dict.fromkeys(range(30), (0.0,) * len(GRID)), 0.001, 0)
    costs = SparsityCosts(8192, GRID, noisy)
    assert _spread(costs.allot(0.5)) < 0.2 < _spread(costs.cheapest(0.5))


def _spread(shares: dict[int, float]) -> float:
    return max(shares.values()) - min(shares.values())
