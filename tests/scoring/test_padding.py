"""Scores and their gradients where padding holds NaN."""

import pytest
import torch

from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer
from dilated_attention_pytorch.scoring.summaries import block_summaries
from dilated_attention_pytorch.scoring.tile_mass import (
    antidiagonal_scores,
    mean_pool_scores,
    min_max_scores,
    tile_mass,
)

N, REAL, SIZE = 64, torch.tensor([64, 25]), 16
VALID = torch.arange(N) < REAL[:, None]
MASK = AttentionMask(N, N, causal=True, key_lengths=REAL)
OPTIONS = {"query_valid": VALID, "key_valid": VALID, "block_size": SIZE, "scale": 0.3}


def low_rank(q, k):
    torch.manual_seed(0)
    scorer = LowRankScorer(2, 8, 2, rank=4)
    return scorer(q, k, MASK, SIZE, query_valid=VALID), list(scorer.parameters())


def summaries(q, k):
    pool = torch.linspace(-1, 1, 16).view(2, 8).requires_grad_()
    names = ("mean", "max", "min", "attention")
    both = [block_summaries(x, SIZE, pooling=names, valid=VALID, pool_query=pool) for x in (q, k)]
    return torch.cat(both), [pool]


def mass(q, k):
    return tile_mass(q, k, MASK, block_size=SIZE, row_weights=VALID[:, None].float()), []


def antidiagonals(q, k):
    return antidiagonal_scores(q, k, MASK, **OPTIONS), []


SCORES = {
    "low_rank": low_rank,
    "summaries": summaries,
    "mass": mass,
    "antidiagonals": antidiagonals,
    "means": lambda q, k: (mean_pool_scores(q, k, **OPTIONS), []),
    "ranges": lambda q, k: (min_max_scores(q, k, **OPTIONS), []),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", SCORES)
def test_padding_changes_no_bit_of_scores_and_gradients(name, value):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, N, 2, 8, generator=generator) for _ in "qk")
    results = []
    for filling in (0.5, value):
        given = [torch.where(VALID[..., None, None], x, filling).requires_grad_() for x in (q, k)]
        scores, parameters = SCORES[name](*given)
        found = [scores]
        if scores.requires_grad and name not in ("means", "ranges", "antidiagonals"):
            found += torch.autograd.grad(scores.square().mean(), [*given, *parameters])
        results.append(found)
    for old, new in zip(*results, strict=True):
        assert old.isfinite().all()
        assert torch.equal(old, new)
