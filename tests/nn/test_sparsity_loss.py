"""get_sparsity_loss brings the layer to its target."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, get_sparsity_loss
from dilated_attention_pytorch.selection.threshold import ThresholdTable

HEADS, DIM, SIZE = 4, 16, 8


def make(**settings: object) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    config = AdaptiveConfig(**{"block_size": SIZE, "base_sparsity": 0.6, **settings})
    return BlockSparseAdaptive(None, None, HEADS, DIM, config)


def tokens(seed: int = 0, length: int = 320) -> Tensor:
    return torch.randn(1, length, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def set_factor(layer: BlockSparseAdaptive, value: float) -> None:
    with torch.no_grad():
        layer.budget_gain.zero_()
        layer.budget_offset.fill_(value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.2, 1.5])
def test_value_is_the_squared_relative_distance(causal: bool, factor: float) -> None:
    layer = make()
    set_factor(layer, factor)
    x = tokens()
    _, info = layer.eval()(x, x, x, is_causal=causal, return_pattern=True)
    density = 1 - info["pattern"].sparsity.item()
    odds = 0.4 / 0.6 * factor
    assert density == pytest.approx(odds / (1 + odds), abs=0.01)
    loss = layer.get_sparsity_loss()
    assert loss.item() == pytest.approx((density / 0.4 - 1) ** 2, abs=0.02)
    loss.backward()
    sign = 0 if factor == 1.0 else (1 if factor > 1 else -1)
    if sign == 0:
        assert loss.item() < 1e-9
        assert layer.budget_offset.grad.abs().max() < 1e-4
    else:
        assert (layer.budget_offset.grad * sign > 0).all(), "the gradient points away from target"
        assert (layer.budget_gain.grad * sign > 0).all()


@pytest.mark.parametrize("factor", [0.4, 1.7])
def test_descent_meets_the_target_from_both_sides(factor: float) -> None:
    layer = make()
    set_factor(layer, factor)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x = tokens()
    x[:, :160] = x[:, :SIZE].repeat(1, 20, 1, 1)
    for _ in range(40):
        layer(x, x, x, is_causal=True)
        optimizer.zero_grad()
        layer.get_sparsity_loss().backward()
        optimizer.step()
    _, info = layer.eval()(x, x, x, is_causal=True, return_pattern=True)
    assert info["pattern"].sparsity.item() == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("budget", ["fixed", "adaptive", "threshold"])
def test_value_counts_what_was_kept(budget: str) -> None:
    layer = make(budget=budget).eval()
    if budget == "threshold":
        layer.set_thresholds(ThresholdTable((320,), (0.03,)))
    x = tokens()
    _, info = layer(x, x, x, return_pattern=True)
    density = 1 - info["pattern"].sparsity.item()
    expected = (density / 0.4 - 1) ** 2
    assert layer.get_sparsity_loss().item() == pytest.approx(expected, abs=0.02)


def test_fixed_budget_gives_a_constant_zero() -> None:
    layer = make(budget="fixed")
    layer(tokens(), tokens(), tokens())
    loss = layer.get_sparsity_loss()
    assert not loss.requires_grad
    assert loss.item() < 1e-9


def test_target_is_the_scheduled_sparsity() -> None:
    layer = make()
    set_factor(layer, 1.0)
    layer.set_base_sparsity(0.2)
    layer(tokens(), tokens(), tokens())
    assert layer.get_sparsity_loss().item() < 1e-6


def test_whole_model() -> None:
    layers = [make(), make()]
    model = nn.ModuleList([*layers, nn.Linear(2, 2)])
    with pytest.raises(RuntimeError, match="forward"):
        get_sparsity_loss(model)
    for layer, factor in zip(layers, (0.5, 1.2), strict=True):
        set_factor(layer, factor)
        layer(tokens(), tokens(), tokens())
    expected = (layers[0].get_sparsity_loss() + layers[1].get_sparsity_loss()) / 2
    loss = get_sparsity_loss(model)
    assert torch.equal(loss, expected)
    assert loss.item() > 0.01
    loss.backward()
    assert layers[0].budget_offset.grad is not None
    with pytest.raises(ValueError, match="model"):
        get_sparsity_loss(nn.Linear(2, 2))
