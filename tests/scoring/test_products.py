"""What is no number stays in the pairs that read it, forwards and backwards."""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.nn.baselines import (
    METHODS,
    BlockSparseTrainingFree,
    TrainingFreeConfig,
)
from dilated_attention_pytorch.scoring.scorer import finite_rows, score_products, take_columns

SCORERS = ("bilinear", "mlp", "low_rank")


def test_a_product_is_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(2, n, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (4, 5)
    )
    assert torch.equal(score_products(q, k), q @ k.mT)
    assert torch.autograd.gradcheck(score_products, (q, k))


def test_what_nobody_read_gives_no_gradient() -> None:
    q, k = torch.ones(2, 3, requires_grad=True), torch.ones(3, 3)
    k[2] = torch.nan
    k.requires_grad_()
    product = score_products(q, k)
    assert product[:, 2].isnan().all()
    product[:, :2].sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert torch.equal(q.grad, torch.full((2, 3), 2.0))
    assert torch.equal(k.grad, torch.tensor([2.0, 2.0, 0.0])[:, None].expand(3, 3))


def test_rows_without_numbers_and_columns_that_are_not_there() -> None:
    q, k = torch.ones(2, 3), torch.ones(3, 3)
    q[0, 1], k[2, 0] = torch.inf, torch.nan
    clean_q, clean_k, bad = finite_rows(q, k)
    assert not clean_q[0].any()
    assert not clean_k[2].any()
    assert bad.tolist() == [[True, True, True], [False, False, True]]
    columns = torch.tensor([[[[-1, 1, 7]]]])
    scores = torch.arange(3.0).view(1, 1, 1, 3)
    assert take_columns(scores, columns).flatten().tolist() == [0, 1, 2]
    assert take_columns(scores[..., :0], columns).flatten().tolist() == [0, 0, 0]


def adaptive(scorer: str, **changes: object) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    settings = {"block_size": 8, "base_sparsity": 0.5, "hidden_dim": 8, **changes}
    config = AdaptiveConfig(scorer=scorer, **settings)
    return BlockSparseAdaptive(num_heads=2, head_dim=8, adaptive_config=config)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("estimator", ["mass", "gumbel", "soft", "straight_through"])
def test_another_document_reaches_no_gradient(scorer: str, estimator: str) -> None:
    layer = adaptive(scorer, estimator=estimator)
    ends = torch.tensor([0, 17, 40], dtype=torch.int32)
    x = torch.randn(5, 1, 40, 2, 8)
    gradients = []
    for filling in (1.0, torch.nan, torch.inf):
        given = x.clone()
        given[:, :, 17:] = filling
        given.requires_grad_()
        q, k, v, score_q, score_k = given
        # Each pass of a layer moves its budgets.
        deepcopy(layer)(
            q, k, v, cu_seqlens=ends, selector_query=score_q, selector_key=score_k,
            generator=torch.Generator().manual_seed(1),
        ).backward(x[0])  # fmt: skip
        assert given.grad is not None
        gradients.append(given.grad[:, :, :17])
    assert gradients[0][3:].abs().sum() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def layers() -> list[tuple[str, torch.nn.Module]]:
    found: list[tuple[str, torch.nn.Module]] = [(name, adaptive(name)) for name in SCORERS]
    found.append(("hierarchy", adaptive("bilinear", hierarchy=(2,), hierarchy_keep=2)))
    config = AdaptiveConfig(block_size=8)
    segments = BlockSparseAdaptive([16, 32], [1, 2], 2, 8, config)
    found.append(("segments", segments))
    for method in METHODS:
        free = TrainingFreeConfig(method=method, block_size=8, base_sparsity=0.5)
        found.append((method, BlockSparseTrainingFree(free, 2, 8)))
    return found


@pytest.mark.parametrize(("name", "layer"), layers())
def test_nothing_to_read_or_to_ask(name: str, layer: torch.nn.Module) -> None:
    for (batch, n, m), causal, train in itertools.product(
        ((0, 24, 24), (2, 0, 0), (2, 24, 0), (2, 0, 24), (2, 1, 1)), (False, True), (False, True)
    ):
        layer.train(train)
        q = torch.randn(batch, n, 2, 8, requires_grad=True)
        k: Tensor = torch.randn(batch, m, 2, 8, requires_grad=True)
        lengths = torch.full((batch,), m)
        out = layer(q, k, k, is_causal=causal, key_lengths=lengths)
        assert out.shape == q.shape
        if m == 0:
            assert not out.any()
        out.sum().backward()
        assert q.grad is not None
        assert q.grad.isfinite().all()
