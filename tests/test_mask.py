"""The token rule, and what it means for tiles, against the rule written out in loops."""

import itertools

import pytest
import torch

from dilated_attention_pytorch.mask import AttentionMask, ceil_div, document_bounds

CASES = [
    {"q_len": 7, "kv_len": 7},
    {"q_len": 7, "kv_len": 7, "causal": True},
    {"q_len": 5, "kv_len": 11, "causal": True, "query_offset": 6},
    {"q_len": 11, "kv_len": 5, "causal": True, "query_offset": -6},
    {"q_len": 6, "kv_len": 9, "causal": True, "query_offset": torch.tensor([3, 0])},
    {"q_len": 8, "kv_len": 8, "key_lengths": torch.tensor([8, 3])},
    {"q_len": 8, "kv_len": 8, "causal": True, "key_lengths": torch.tensor([0, 5])},
    {
        "q_len": 9,
        "kv_len": 9,
        "causal": True,
        "document_ids": torch.tensor(
            [[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, -1, -1, -1, -1]], dtype=torch.int32
        ),
    },
]
SIZES = [(1, 1), (2, 3), (4, 4), (3, 2), (16, 16)]


def allowed(case, b, n, m):
    """The rule in words of the documentation."""
    offset = case.get("query_offset", 0)
    offset = int(offset[b]) if isinstance(offset, torch.Tensor) else offset
    if case.get("causal") and m > n + offset:
        return False
    if "key_lengths" in case and m >= int(case["key_lengths"][b]):
        return False
    if "document_ids" in case:
        ids = case["document_ids"][b]
        return bool(ids[n] == ids[m] >= 0)
    return True


def blocks(case, size):
    lengths = (case["q_len"], case["kv_len"])
    return [torch.arange(ceil_div(n, s)) for n, s in zip(lengths, size, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens(case):
    mask = AttentionMask(**case)
    rows = torch.arange(case["q_len"]).view(1, -1, 1)
    columns = torch.arange(case["kv_len"]).view(1, 1, -1)
    got = mask.tokens(rows, columns).expand(2, -1, -1)
    for b, n, m in itertools.product(range(2), range(case["q_len"]), range(case["kv_len"])):
        assert bool(got[b, n, m]) == allowed(case, b, n, m)
    assert mask.per_sample == (not torch.equal(got[0], got[1]))
    for b in range(2):
        assert torch.equal(mask.sample(b).tokens(rows, columns)[0], got[b])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_and_full_tiles(case, size):
    mask = AttentionMask(**case)
    rows, columns = blocks(case, size)
    index = rows.view(1, -1, 1), columns.view(1, 1, -1)
    some = mask.tiles(size, *index).expand(2, -1, -1)
    full = mask.full_tiles(size, *index).expand(2, -1, -1)
    for b, i, j in itertools.product(range(2), rows.tolist(), columns.tolist()):
        queries = range(i * size[0], min((i + 1) * size[0], case["q_len"]))
        keys = range(j * size[1], (j + 1) * size[1])
        seen = [m < case["kv_len"] and allowed(case, b, n, m) for n in queries for m in keys]
        assert bool(some[b, i, j]) == any(seen)
        assert bool(full[b, i, j]) == all(seen)


def test_indices_outside_are_never_allowed():
    mask = AttentionMask(4, 4)
    index = torch.tensor([-1, 0, 3, 4])
    rows, columns = torch.tensor([0, 3, 4]).view(1, -1, 1), index.view(1, 1, -1)
    assert mask.tokens(rows, columns)[0].tolist() == [
        [False, True, True, False],
        [False, True, True, False],
        [False] * 4,
    ]


def test_document_bounds():
    start, end = document_bounds(torch.tensor([[0, 0, 1, 3, 3, -1]], dtype=torch.int32))
    assert start.tolist() == [[0, 0, 2, 3, 3, 5]]
    assert end.tolist() == [[2, 2, 3, 5, 5, 6]]
