"""Running budgets against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_attention_pytorch.candidates import row_ranges
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.selection.budget import (
    documents_reach,
    next_budget,
    running_budget,
    seen_blocks,
    share_units,
)


def causal_rows(blocks: int, cuts: list[int] | None = None):
    ids = None
    if cuts is not None:
        ids = torch.zeros(1, blocks, dtype=torch.int32)
        for cut in cuts:
            ids[:, cut:] += 1
    mask = AttentionMask(blocks, blocks, True, document_ids=ids)
    return row_ranges(mask, (1, 1), has_diagonal=True, device=torch.device("cpu"))


def by_hand(
    keep: list[float],
    forced: list[int],
    limit: list[int],
    allowed: list[int],
    phase: float,
    even: float = 1.0,
    reach: float = 0.0,
):
    """Row after row: what was earned so far and not given, but never less than is forced."""
    earned, given, out = 0.0, 0, []
    for share, low, high, visible in zip(keep, forced, limit, allowed, strict=True):
        earned += min(even * share * max(visible, reach) + (1 - even) * low, high)
        out.append(min(max(math.floor(earned + phase) - given, low), high))
        given += out[-1]
    return out


@given(st.data())
def test_equals_a_loop_and_one_row_after_another(data: st.DataObject) -> None:
    blocks, heads = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    # Eighths, and their quarters, are exact in units of 2**-16.
    size = heads * blocks
    eighths = data.draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    keep = torch.tensor(eighths).view(1, heads, -1) / 8
    even = data.draw(st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]))
    given_even = None if even is None else torch.tensor(even)
    reach = data.draw(st.sampled_from([None, 0.0, 2.5, 7.0, 100.0]))
    given_reach = None if reach is None else torch.tensor(reach)
    rows, most = causal_rows(blocks), data.draw(st.integers(0, 4))
    limit = rows.num_allowed.long()
    forced = limit.clamp(max=most)
    exact, got = running_budget(keep, forced, limit, rows, given_even, given_reach)
    lists = [x.flatten().tolist() for x in (forced, limit, rows.num_allowed)]
    part = 1.0 if even is None else even, reach or 0.0
    for head in range(heads):
        want = by_hand(keep[0, head].tolist(), *lists, (head + 0.5) / heads, *part)
        assert got[0, head].tolist() == want
    # What is lowered are whole budgets alone.
    assert torch.equal(exact, running_budget(keep, forced, limit, rows, None, given_reach)[0])
    seen = seen_blocks(rows.num_allowed, given_reach)
    earned = share_units(keep, seen, forced, limit, given_even).cumsum(-1)
    given_so_far = torch.zeros(1, heads, 1, dtype=torch.long)
    for i in range(blocks):
        now = slice(i, i + 1)
        row = (earned[..., now], given_so_far, forced[..., now], limit[..., now])
        assert torch.equal(next_budget(*row), got[..., now].long())
        given_so_far = given_so_far + got[..., now]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
def test_every_beginning_that_is_long_enough_meets_the_share(share: float) -> None:
    rows = causal_rows(400)
    limit = rows.num_allowed.long()
    _, budget = running_budget(torch.full((1, 1, 400), share), torch.ones_like(limit), limit, rows)
    spent, seen = budget.cumsum(-1).flatten(), limit.cumsum(-1).flatten()
    enough = seen * share >= torch.arange(1, 401)
    assert enough[-1]
    assert ((spent - seen * share).abs()[enough] <= 0.5 + 1e-4).all()


def test_rows_below_the_reach_get_as_many_as_the_row_that_sees_so_many() -> None:
    rows = causal_rows(64)
    limit = rows.num_allowed.long()
    keep, reach = torch.full((1, 1, 64), 0.25), torch.tensor(32.0)
    exact, got = running_budget(keep, limit.clamp(max=1), limit, rows, reach=reach)
    seen = torch.arange(1, 65).clamp(min=32)
    assert torch.equal(exact.flatten(), torch.minimum(0.25 * seen, torch.arange(1, 65).float()))
    assert got.flatten()[:32].tolist() == [*range(1, 8), *[8] * 25]
    assert got.sum() == exact.sum()


def test_the_reach_of_a_document_is_what_its_last_row_sees() -> None:
    got = documents_reach(causal_rows(300, [11, 19]))
    assert got.tolist() == [[[11.0] * 11 + [8.0] * 8 + [256.0] * 281]]
    assert documents_reach(causal_rows(0)).shape == (1, 1, 0)


def test_documents_are_budgeted_apart() -> None:
    rows = causal_rows(30, [11, 19])
    limit = rows.num_allowed.long()
    keep = torch.full((1, 1, 30), 0.3)
    _, got = running_budget(keep, limit.clamp(max=1), limit, rows)
    for first, last in ((0, 11), (11, 19), (19, 30)):
        alone = causal_rows(last - first)
        limit = alone.num_allowed.long()
        _, want = running_budget(keep[..., first:last], limit.clamp(max=1), limit, alone)
        assert torch.equal(got[..., first:last], want)


def test_exact_budgets_are_differentiable_in_the_share() -> None:
    rows = causal_rows(5)
    keep = torch.full((1, 1, 5), 0.5, requires_grad=True)
    limit = rows.num_allowed.long()
    exact, _ = running_budget(keep, limit.clamp(max=1), limit, rows)
    exact.sum().backward()
    # The first two rows are at what is forced (the second ties).
    assert keep.grad is not None
    assert keep.grad.flatten().tolist()[2:] == [3.0, 4.0, 5.0]
