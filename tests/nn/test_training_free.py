"""Training-free selectors: each finds what its rule says, under the common budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import BlockSparseFixed
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.baselines import (
    METHODS,
    BlockSparseTrainingFree,
    TrainingFreeConfig,
)
from dilated_attention_pytorch.scoring.tile_mass import (
    antidiagonal_scores,
    mean_pool_scores,
    min_max_scores,
    tile_mass,
)
from dilated_attention_pytorch.selection.threshold import ThresholdTable

CONTENT = [name for name in METHODS if name != "sink_window"]


def layer(method: str, **changes: Any) -> BlockSparseTrainingFree:
    settings = {"base_sparsity": 0.6, "block_size": 16, **changes}
    config = TrainingFreeConfig(method=method, **settings)
    return BlockSparseTrainingFree(config, 4, 8, num_kv_heads=2, scale=0.7)


def tokens(length: int = 200, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, length, 2, 8)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    return torch.randn(batch, length, 4, 8, generator=generator), k, v


def kept(module: BlockSparseTrainingFree, *x: Tensor, **options: Any) -> Tensor:
    _, info = module(*x, is_causal=True, return_pattern=True, **options)
    return info["pattern"].to_dense()


@pytest.mark.parametrize("method", METHODS)
def test_meets_the_sparsity_with_forced_blocks(method: str) -> None:
    module = layer(method)
    _, info = module(*tokens(), is_causal=True, return_pattern=True)
    assert float(info["pattern"].sparsity) == pytest.approx(0.6, abs=0.01)
    dense = info["pattern"].to_dense()
    assert bool(dense[..., 0].all())
    assert bool(dense.diagonal(dim1=-2, dim2=-1).all())
    module.set_base_sparsity(0.3)
    _, info = module(*tokens(), is_causal=True, return_pattern=True)
    assert float(info["pattern"].sparsity) == pytest.approx(0.3, abs=0.01)


def test_sink_window_is_the_fixed_pattern() -> None:
    fixed = BlockSparseFixed(
        "local", 4, 8, base_sparsity=0.6, num_kv_heads=2, block_size=16, num_sink_blocks=1
    )
    _, info = fixed(*tokens(), is_causal=True, return_pattern=True)
    expected = info["pattern"].to_dense()
    assert torch.equal(kept(layer("sink_window"), *tokens()), expected.expand(1, 4, -1, -1))


@pytest.mark.parametrize("method", CONTENT)
def test_finds_a_block_that_attracts_all_attention(method: str) -> None:
    q, k, v = tokens()
    # Every query of the last block points where the keys of block 5 lie.
    q[:, 192:] = 3.0
    k[:, 80:96] = 3.0
    chosen = kept(layer(method, base_sparsity=0.5), q, k, v)
    assert bool(chosen[:, :, -1, 5].all())


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_documents_do_not_reach_a_sample(method: str) -> None:
    q, k, v = tokens(120)
    alone = kept(layer(method), *(x[1:, :70] for x in (q, k, v)))
    spoiled = [x.clone() for x in (q, k, v)]
    for x in spoiled:
        x[1, 70:] = 50.0
    padded = kept(layer(method), *spoiled, key_lengths=torch.tensor([120, 70]))
    padded = padded.expand(2, -1, -1, -1)
    assert torch.equal(padded[1:, :, :5, :5], alone.expand(1, 4, -1, -1))
    assert not padded[1, :, 5:].any()
    edges = torch.tensor([[0, 50, 120], [0, 70, 120]])
    packed = kept(layer(method), q, k, v, cu_seqlens=edges).expand(2, -1, -1, -1)
    assert torch.equal(packed[1:, :, :5, :5], alone.expand(1, 4, -1, -1))


def test_oracle_ranks_by_the_true_mass_with_its_scale() -> None:
    q, k, v = tokens()
    mass = tile_mass(q, k, AttentionMask(200, 200, causal=True), block_size=16, scale=0.7)
    chosen = kept(layer("oracle"), q, k, v)
    scored = torch.tril(torch.ones(13, 13, dtype=torch.bool), -1)
    scored[:, 0] = False
    worst = mass.masked_fill(~(chosen & scored), 9.0).amin(-1)
    best = mass.masked_fill(chosen | ~scored, -1.0).amax(-1)
    assert bool((worst >= best).all())


def test_mean_pool_is_the_product_of_means() -> None:
    q, k, _ = tokens(32)
    scores = mean_pool_scores(q, k, block_size=16, scale=0.5)
    wanted = 0.5 * q[1, 16:, 3].mean(0) @ k[1, :16, 1].mean(0)
    torch.testing.assert_close(scores[1, 3, 1, 0], wanted)


def test_min_max_bounds_every_logit() -> None:
    q, k, _ = tokens(48)
    scores = min_max_scores(q, k, block_size=16, scale=0.5)
    logits = 0.5 * torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(2, 2))
    tiles = logits.unflatten(3, (3, 16)).unflatten(2, (3, 16)).amax((3, 5))
    assert bool((scores >= tiles - 1e-5).all())
    # With one key per block the bound is exact.
    exact = min_max_scores(q[:, :3], k[:, :3], block_size=1, scale=0.5)
    torch.testing.assert_close(exact, logits[:, :, :3, :3])


def test_antidiagonal_with_stride_one_is_the_exact_mass() -> None:
    q, k, _ = tokens(80)
    mask = AttentionMask(80, 80, causal=True)
    scores = antidiagonal_scores(q, k, mask, block_size=16, scale=0.5, stride=1)
    mass = tile_mass(q, k, mask, block_size=16, scale=0.5)
    seen = torch.tril(torch.ones(5, 5, dtype=torch.bool))
    torch.testing.assert_close(scores.exp()[..., seen], mass[..., seen])


def test_antidiagonal_sums_one_logit_per_row_and_column_of_a_square() -> None:
    q, k, _ = tokens(16)
    mask = AttentionMask(16, 16)
    scores = antidiagonal_scores(q, k, mask, block_size=8, scale=0.5, stride=4)
    logits = 0.5 * torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(2, 2))
    squares = logits.unflatten(3, (4, 4)).unflatten(2, (4, 4))
    anti = torch.stack([squares[:, :, :, t, :, 3 - t] for t in range(4)]).mean(0)
    wanted = anti.softmax(-1).unflatten(3, (2, 2)).sum(-1).unflatten(2, (2, 2)).mean(3)
    torch.testing.assert_close(scores.exp(), wanted)


def test_thresholds_are_used_and_required() -> None:
    module = layer("oracle", budget="threshold")
    with pytest.raises(RuntimeError, match="set_thresholds"):
        module(*tokens(), is_causal=True)
    module.set_thresholds(ThresholdTable((200,), (0.1,)))
    q, k, v = tokens()
    mass = tile_mass(q, k, AttentionMask(200, 200, causal=True), block_size=16, scale=0.7)
    forced = torch.eye(13, dtype=torch.bool)
    forced[:, 0] = True
    assert torch.equal(kept(module, q, k, v), (mass >= 0.1) | forced)
    with pytest.raises(ValueError, match="budget='threshold'"):
        layer("oracle").set_thresholds(ThresholdTable((200,), (0.1,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "best"}, "method must be one of"),
        ({"budget": "free"}, "budget must be one of"),
        ({"method": "sink_window", "budget": "threshold"}, "no scores"),
        ({"base_sparsity": 1.0}, "base_sparsity"),
        ({"num_sink_blocks": -1}, "num_sink_blocks"),
        ({"stride": 7}, "stride must divide"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingFreeConfig(**changes)
