"""The selector's gradient against its formula, row by row."""

from __future__ import annotations

import torch

from dilated_attention_pytorch.selection.mass_target import mass_target_probe


def by_hand(
    scores: list[float], scored: list[bool], mass: list[float], weight: float, rows: int
) -> list[float]:
    """λ / R · w (softmax(S) - T) of one row."""
    kept = [j for j, ok in enumerate(scored) if ok]
    out = [0.0] * len(scores)
    if not kept:
        return out
    total = sum(mass[j] for j in kept)
    normal = sum(2.718281828459045 ** scores[j] for j in kept)
    w = max(mass[j] for j in kept)
    for j in kept:
        target = mass[j] / total if total else 0.0
        out[j] = weight / rows * w * (2.718281828459045 ** scores[j] / normal - target)
    return out


def test_gradient_is_the_formula() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 4, 5, requires_grad=True)
    scored = torch.rand(2, 3, 4, 5) < 0.6
    scored[0, 0, 0] = False
    mass = torch.rand(2, 3, 4, 5)
    mass[1, 1, 1] = 0
    probe = mass_target_probe(scores, scored, 0.3, 8)
    assert probe.shape == scores.shape
    assert (probe == 0).all()
    probe.backward(mass)
    assert scores.grad is not None
    for b in range(2):
        for h in range(3):
            for i in range(4):
                expected = by_hand(
                    scores[b, h, i].tolist(), scored[b, h, i].tolist(), mass[b, h, i].tolist(),
                    0.3, 8,
                )  # fmt: skip
                torch.testing.assert_close(
                    scores.grad[b, h, i], torch.tensor(expected), atol=1e-7, rtol=1e-4
                )


def test_rows_pull_towards_their_mass_and_sum_to_zero() -> None:
    scores = torch.zeros(1, 1, 1, 3, requires_grad=True)
    probe = mass_target_probe(scores, torch.ones(1, 1, 1, 3).bool(), 1.0, 1)
    probe.backward(torch.tensor([[[[0.1, 0.7, 0.2]]]]))
    assert scores.grad is not None
    pull = -scores.grad.flatten()
    assert pull[1] > 0
    assert pull[0] < 0
    assert pull.sum().abs() < 1e-6


def test_half_precision_scores_get_gradients_of_their_dtype() -> None:
    scores = torch.zeros(1, 1, 1, 3, dtype=torch.bfloat16, requires_grad=True)
    mass_target_probe(scores, torch.ones(1, 1, 1, 3).bool(), 1.0, 1).sum().backward()
    assert scores.grad is not None
    assert scores.grad.dtype == torch.bfloat16
