"""Deterministic top-k against sorting."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from brute_force import best
from dilated_attention_pytorch.selection import choose_top_k

SPECIAL = [0.0, -0.0, 1.0, 1.0, -1.0, math.inf, -math.inf, math.nan]


@given(
    st.lists(st.tuples(st.sampled_from(SPECIAL), st.booleans()), min_size=1, max_size=9),
    st.integers(0, 10),
    st.integers(0, 3),
)
def test_equals_sorting(row: list[tuple[float, bool]], count: int, slack: int) -> None:
    scores, allowed = [s for s, _ in row], [a for _, a in row]
    got = choose_top_k(
        torch.tensor(scores), torch.tensor(allowed), torch.tensor(count), count + slack
    )
    assert got.nonzero().flatten().tolist() == best(scores, allowed, count)


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.zeros(2, 3, 50)
    count = torch.tensor([[0, 1, 7], [50, 49, 3]])
    chosen = choose_top_k(scores, torch.ones(50, dtype=torch.bool), count, 50)
    for b in range(2):
        for i in range(3):
            assert chosen[b, i].nonzero().flatten().tolist() == list(range(int(count[b, i])))


def test_nan_ranks_last_but_still_counts() -> None:
    scores = torch.tensor([math.nan, 0.0, math.nan, -5.0])
    everything = torch.ones(4, dtype=torch.bool)
    assert choose_top_k(scores, everything, torch.tensor(2), 2).tolist() == [
        False,
        True,
        False,
        True,
    ]
    three = choose_top_k(scores, everything, torch.tensor(3), 3)
    assert three.tolist() == [True, True, False, True]


def test_has_no_gradient() -> None:
    scores = torch.randn(4, requires_grad=True)
    assert not choose_top_k(scores, torch.ones(4).bool(), torch.tensor(2), 2).requires_grad


def test_one_count_for_all_samples_chooses_in_each() -> None:
    scores = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    allowed, count = torch.ones(6, dtype=torch.bool), torch.tensor([1, 2, 3, 6])
    chosen = choose_top_k(scores, allowed, count.view(1, 1, 4), 6)
    assert torch.equal(chosen, choose_top_k(scores, allowed, count.expand(3, 2, 4), 6))
    assert torch.equal(chosen.sum(-1), count.expand(3, 2, 4))
