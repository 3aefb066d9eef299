"""Scores and their gradients by kernels against the scorer's.

Compiled where there is a GPU, else interpreted.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import BlockPattern, ImportanceScorer

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch.ops.block_selection.scores import (
    bilinear_op,
    kept_op,
    products_op,
    towers_op,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("rank", [5, 48, 200])
def test_products_of_listed_candidates_and_of_kept_tiles(rank: int) -> None:
    q, k = randn(2, 2, 5, rank).requires_grad_(), randn(2, 2, 7, rank, seed=1).requires_grad_()
    dense = randn(2, 2, 5, 7, seed=2) < 0.2
    pattern = BlockPattern.from_dense(dense, q_len=5, kv_len=7, block_size=1)
    listed = torch.where(pattern.slot_used(), pattern.kv_indices, -1)
    products = bilinear_op(q.detach(), k.detach(), listed)
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    want = (wide[0] @ wide[1].transpose(-1, -2)).gather(-1, pattern.kv_indices.long())
    want = want.where(pattern.slot_used(), 0)
    torch.testing.assert_close(products.double(), want, rtol=1e-5, atol=1e-4)
    turned = pattern.transpose()
    kept = kept_op(
        q, k, products, pattern.kv_num_blocks, pattern.kv_indices, turned.offsets, turned.slots
    )
    weight = randn(*kept.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad((kept * weight).sum(), (q, k)),
        torch.autograd.grad((want * weight).sum(), wide),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [5, 48])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 130)])
def test_products_of_all_pairs(rank: int, rows: int, columns: int) -> None:
    q, k = randn(2, 2, rows, rank), randn(2, 2, columns, rank, seed=1)
    want = q.double() @ k.double().transpose(-1, -2)
    torch.testing.assert_close(products_op(q, k).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_towers_equal_the_scorers(share: int, kv_heads: int) -> None:
    scorer = ImportanceScorer(24, 4, hidden_dim=8, heads_per_pattern=share).double().to(DEVICE)
    with torch.no_grad():
        scorer.gain.fill_(1.7)
        queries, keys = randn(2, 37, 4, 24).double(), randn(2, 5, kv_heads, 24).double()
        want = scorer.encode_queries(queries), scorer.encode_keys(keys)
        scorer.float()
        found = towers_op(
            queries.float().transpose(1, 2), keys.float().transpose(1, 2),
            scorer.query_in, scorer.key_in, scorer.gain, 1 / (8**0.5 * share), share,
        )  # fmt: skip
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
