"""The low-rank scorer: exact at full rank, closest below, in chunks, through a layer."""

import pytest
import torch

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.scoring import tile_mass as module
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer, low_rank_maps
from dilated_attention_pytorch.scoring.tile_mass import tile_mass


def tokens(heads, length=90, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Unequal directions, as real queries and keys have.
    spread = torch.linspace(0.1, 2, 8)[torch.randperm(8, generator=generator)]
    return torch.randn(batch, length, heads, 8, generator=generator) * spread


def exact(net):
    """A scorer whose maps change nothing."""
    with torch.no_grad():
        for x in (net.query_map, net.key_map):
            x.copy_(torch.eye(8))
    return net


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stride", [1, 4])
def test_at_full_rank_it_is_the_mass_of_the_sampled_queries(causal, stride):
    q, k = tokens(4), tokens(2, seed=1)
    mask = AttentionMask(90, 90, causal=causal)
    net = exact(LowRankScorer(4, 8, 2, rank=8, query_stride=stride, scale=0.7))
    weights = (torch.arange(90) % stride == 0).float().view(1, 1, 90)
    want = tile_mass(q, k, mask, block_size=16, scale=0.7, row_weights=weights)
    torch.testing.assert_close(net(q, k, mask, 16).exp(), want, rtol=1e-4, atol=1e-6)


def test_lengths_and_documents_are_those_of_the_mask():
    q, k = tokens(4), tokens(2, seed=1)
    documents = torch.arange(90).div(50, rounding_mode="floor").expand(2, 90)
    mask = AttentionMask(90, 90, causal=True, document_ids=documents)
    net = exact(LowRankScorer(4, 8, 2, rank=8, query_stride=1, scale=0.7))
    want = tile_mass(q, k, mask, block_size=16, scale=0.7)
    torch.testing.assert_close(net(q, k, mask, 16).exp(), want, rtol=1e-4, atol=1e-6)
    valid = torch.arange(90) < torch.tensor([[90], [37]])
    mask = AttentionMask(90, 90, causal=True, key_lengths=torch.tensor([90, 37]))
    got = net(q, k, mask, 16, query_valid=valid).exp()
    torch.testing.assert_close(got[1, :, :3, :3].sum(-1), torch.ones(4, 3))
    assert not got[1, :, :, 3:].gt(1e-30).any()
    short = net(q[1:, :37], k[1:, :37], AttentionMask(37, 37, causal=True), 16)
    torch.testing.assert_close(got[1:, :, :3, :3], short.exp(), rtol=1e-4, atol=1e-6)


def test_fitted_maps_are_the_closest_of_their_rank():
    """No other maps of rank 3 that are tried come closer to the logits; rank 8 meets them."""
    q, k = tokens(4, 4000, 1)[0].transpose(0, 1), tokens(2, 4000, 1, seed=1)[0].transpose(0, 1)
    moments = [(x.mT @ x) / 4000 for x in (q, k)]
    groups = k.repeat_interleave(2, 0)

    def error(maps):
        rough = (q @ maps[0])[:, :500] @ (groups @ maps[1])[:, 500:1000].mT
        return (rough - q[:, :500] @ groups[:, 500:1000].mT).square().mean().item()

    assert error(low_rank_maps(*moments, 8)) < 1e-6
    best = low_rank_maps(*moments, 3)
    for seed in range(20):
        torch.manual_seed(seed)
        other = [x + 0.1 * x.abs().mean() * torch.randn_like(x) for x in best]
        assert error(best) < error(other)
        basis = torch.linalg.qr(torch.randn(4, 8, 8)).Q[..., :3]
        assert error(best) < error((basis, basis))


def test_chunks_change_nothing_and_gradients_reach_the_maps(monkeypatch):
    q, k = tokens(4), tokens(2, seed=1)
    mask = AttentionMask(90, 90, causal=True)
    torch.manual_seed(0)
    net = LowRankScorer(4, 8, 2, rank=3)
    found = []
    for limit in (1 << 22, 1):
        monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", limit)
        scores = net(q, k, mask, 16)
        scores.exp().square().sum().backward()
        found.append((scores.detach(), net.query_map.grad, net.key_map.grad))
        net.zero_grad()
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)
        assert x.abs().sum() > 0


def test_a_layer_takes_it():
    """It finds a single matching token, which means and maxima of blocks lose."""
    config = AdaptiveConfig(
        scorer="low_rank", hidden_dim=8, query_stride=1, block_size=16, budget="fixed",
        num_selected_blocks=2, num_explore_blocks=0,
    )  # fmt: skip
    layer = BlockSparseAdaptive(num_heads=4, head_dim=8, adaptive_config=config, num_kv_heads=2)
    exact(layer.scorer)
    q, k = 0.1 * tokens(4, 96), 0.1 * tokens(2, 96, seed=1)
    needle = torch.zeros(8).index_fill(0, torch.tensor([3]), 9.0)
    q[:, 90], k[:, 20] = needle, needle
    pattern = layer.eval()(q, k, k, is_causal=True, return_pattern=True)[1]["pattern"]
    assert pattern.to_dense()[:, :, 5, 1].all()
    layer.train()(q, k, k, is_causal=True).sum().backward()
    assert layer.scorer.query_map.grad.abs().sum() > 0


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="rank must be at most head_dim=8, got 9"):
        LowRankScorer(4, 8, 2, rank=9)
    with pytest.raises(ValueError, match="query_stride must divide block_size=64, got 7"):
        AdaptiveConfig(scorer="low_rank", query_stride=7)
    with pytest.raises(ValueError, match="hierarchy needs scorer='bilinear' or 'mlp'"):
        AdaptiveConfig(scorer="low_rank", hierarchy=(4,))
