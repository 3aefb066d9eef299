"""Gumbel noise by its distribution, the relaxation by its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import gumbel_softmax_topk
from dilated_attention_pytorch.selection.top_k import _op, gumbel_noise, relaxed_top_k


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    noise = gumbel_noise(torch.empty(400_000), generator())
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_noise_is_finite_at_the_ends_of_the_uniform_range(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: ends)
    noise = gumbel_noise(torch.empty(3))
    assert noise.isfinite().all()
    assert noise[0] < noise[1] < noise[2]


def test_the_best_is_a_sample_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    rows = logits.expand(40_000, 4)
    drawn = gumbel_softmax_topk(rows, 1, generator=generator()).mean(0)
    torch.testing.assert_close(drawn, logits.softmax(0), atol=0.01, rtol=0)


def test_two_of_four_without_replacement() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = gumbel_softmax_topk(p.log().expand(40_000, 4), 2, generator=generator())
    assert (drawn.sum(-1) == 2).all()
    both = (drawn[:, 0] * drawn[:, 1]).mean().item()
    expected = 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7
    assert both == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
def test_relaxed_weights_sum_to_k(temperature: float) -> None:
    logits = torch.randn(5, 9, dtype=torch.float64)
    logits[:, 3] = -torch.inf
    count = torch.tensor([0, 1, 3, 7, 8])
    weights = relaxed_top_k(logits, count, 8, temperature)
    assert (weights >= 0).all()
    assert (weights <= 1).all()
    assert (weights[:, 3] == 0).all()
    assert (weights.sum(-1) <= count + 1e-6).all()
    assert (weights.sum(-1) >= 0.5 * count).all()


def test_relaxation_becomes_hard_as_it_cools() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    cold = relaxed_top_k(logits, torch.tensor(2), 2, 0.01)
    torch.testing.assert_close(cold, torch.tensor([0.0, 1.0, 0.0, 1.0]), atol=1e-4, rtol=0)
    warm = relaxed_top_k(logits, torch.tensor(2), 2, 10.0)
    assert warm.max() - warm.min() < 0.3


def test_hard_weights_carry_the_gradient_of_the_soft_ones() -> None:
    weight = torch.randn(9)
    grads = []
    for hard in (True, False):
        scores = torch.linspace(-1, 1, 9).requires_grad_()
        out = gumbel_softmax_topk(scores, 3, temperature=0.5, hard=hard, generator=generator())
        if hard:
            assert sorted(out.tolist()) == [0.0] * 6 + [1.0] * 3
        (out * weight).sum().backward()
        grads.append(scores.grad)
    assert grads[0] is not None
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1])


def test_gradient_of_the_relaxation() -> None:
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    count = torch.tensor([2, 4])
    assert torch.autograd.gradcheck(lambda x: relaxed_top_k(x, count, 4, 0.7), logits)


@pytest.mark.parametrize("temperature", [0.02, 0.7])
def test_the_operator_of_recorded_programs_gives_the_same(temperature: float) -> None:
    """The gradients of what is cut off, excluded or nearly hard, too."""
    logits = torch.randn(3, 6, dtype=torch.float64, generator=generator())
    logits[1, 2], logits[2, :] = -torch.inf, -torch.inf
    count, weight = torch.tensor([2, 4, 0]), torch.randn(3, 6, dtype=torch.float64)
    found = []
    for compute in (relaxed_top_k, _op):
        z, tau = logits.clone().requires_grad_(), torch.tensor(temperature, requires_grad=True)
        out = compute(z, count, 5, tau)
        (out * weight).sum().backward()
        found.append((out, z.grad, tau.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
    arguments = (logits.requires_grad_(), count, 5, tau)
    torch.library.opcheck(_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("temperature", [0.1, 0.4, 1.0, 3.0])
def test_excluded_columns_leave_the_gradient_of_the_temperature_alone(temperature: float) -> None:
    logits = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
    count = torch.tensor(2)
    found = []
    for z in (logits, torch.cat([logits, torch.full((2,), -math.inf, dtype=torch.float64)])):
        tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        relaxed_top_k(z, count, 2, tau).square().sum().backward()
        found.append(tau.grad)
    torch.testing.assert_close(found[0], found[1])


def test_without_noise_it_is_the_plain_top_k() -> None:
    scores = torch.randn(3, 8)
    got = gumbel_softmax_topk(scores, 3, noise=False)
    expected = torch.zeros(3, 8).scatter(-1, scores.topk(3).indices, 1.0)
    assert torch.equal(got, expected)


def test_allowed_columns_and_counts_per_row() -> None:
    allowed = torch.tensor([True, False, True, True, False])
    k = torch.tensor([[1], [3], [5]])
    out = gumbel_softmax_topk(torch.zeros(3, 1, 5), k, allowed=allowed, generator=generator())
    assert out.sum(-1).flatten().tolist() == [1.0, 3.0, 3.0]
    assert (out[..., ~allowed] == 0).all()


def test_generator_fixes_the_draw() -> None:
    scores = torch.zeros(50, 20)
    first = gumbel_softmax_topk(scores, 3, generator=generator(1))
    assert torch.equal(first, gumbel_softmax_topk(scores, 3, generator=generator(1)))
    assert not torch.equal(first, gumbel_softmax_topk(scores, 3, generator=generator(2)))


@pytest.mark.parametrize(
    ("name", "options"),
    [("k", {"k": -1}), ("k", {"k": 9}), ("temperature", {"k": 1, "temperature": 0.0})],
)
def test_bad_arguments(name: str, options: dict) -> None:
    with pytest.raises(ValueError, match=name):
        gumbel_softmax_topk(torch.zeros(8), **options)


def test_integer_scores() -> None:
    with pytest.raises(TypeError, match="scores"):
        gumbel_softmax_topk(torch.zeros(8, dtype=torch.int64), 2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"k": 6}, ValueError, r"k must lie in \[0, 5\]"),
        ({"k": torch.tensor([1, 9])}, ValueError, r"k must lie in \[0, 5\].* got 1 to 9"),
        ({"k": torch.tensor([-1, 2])}, ValueError, "got -1 to 2"),
        ({"k": torch.tensor([1, 2, 3])}, ValueError, "one entry per row"),
        ({"k": torch.tensor([1.0, 2.0])}, TypeError, "k must hold integers"),
        ({"k": 2.0}, TypeError, "k must be an int"),
        ({"k": True}, TypeError, "k must be an int"),
        ({"k": 2, "temperature": 0}, ValueError, "temperature"),
        ({"k": 2, "allowed": torch.ones(5)}, TypeError, "allowed must hold booleans"),
        ({"k": 2, "scores": [1.0, 2.0]}, TypeError, "scores must be a Tensor, got list"),
        ({"k": 2, "scores": torch.ones(2, 5).int()}, TypeError, "scores must be"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        gumbel_softmax_topk(**{"scores": torch.zeros(2, 5), **arguments})
