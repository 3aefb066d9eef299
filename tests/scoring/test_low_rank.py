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


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("stride", [1, 4])
def test_the_past_is_the_queries_up_to_the_first_of_a_block(stride, documents):
    """As many as a block has; those of another document count for nothing."""
    q, k = tokens(4), tokens(2, seed=1)
    # As a layer lays them out: every document begins a block.
    ids = torch.arange(90).div(48, rounding_mode="floor").expand(2, 90) if documents else None
    mask = AttentionMask(90, 90, causal=True, document_ids=ids)
    net = exact(LowRankScorer(4, 8, 2, rank=8, query_stride=stride, scale=0.7))
    got = net(q, k, mask, 16, past=True).exp()
    for row in range(6):
        first = row * 16
        begin = 48 if documents and row >= 3 else 0
        sampled = [t for t in range(first, first - 16, -stride) if t >= begin]
        weights = torch.zeros(90).index_fill(0, torch.tensor(sampled), 1.0)
        masses = tile_mass(q, k, mask, block_size=16, scale=0.7, row_weights=weights.view(1, 1, 90))
        counts = weights.view(1, 1, 90)
        counts = torch.nn.functional.pad(counts, (0, 6)).unflatten(2, (6, 16)).sum(-1)
        want = (masses * counts[..., None]).sum(2) / len(sampled)
        torch.testing.assert_close(got[:, :, row], want, rtol=1e-4, atol=1e-6)


def test_the_past_knows_nothing_later():
    q, k = tokens(4), tokens(2, seed=1)
    net = LowRankScorer(4, 8, 2, rank=3)
    mask = AttentionMask(90, 90, causal=True)
    want = net(q, k, mask, 16, past=True)
    other_q, other_k = q.clone(), k.clone()
    other_q[:, 33:], other_k[:, 33:] = 5.0, 5.0
    got = net(other_q, other_k, mask, 16, past=True)
    torch.testing.assert_close(got[:, :, :3], want[:, :, :3], rtol=0, atol=0)
    assert not torch.allclose(got[:, :, 3:], want[:, :, 3:])
    begin = net(q[:, :70], k[:, :70], AttentionMask(70, 70, causal=True), 16, past=True)
    torch.testing.assert_close(begin, want[:, :, :5, :5])


@pytest.mark.parametrize("share", [1, 2])
def test_a_row_can_be_rated_alone(share):
    """By its own queries against keys as they are; one that does not count may hold anything."""
    q, k = tokens(4), tokens(2, seed=1)
    net = LowRankScorer(4, 8, 2, rank=3, heads_per_pattern=share)
    with torch.no_grad():
        net.key_map.add_(0.1 * torch.randn_like(net.key_map))
    want = net(q, k, AttentionMask(90, 90, causal=True), 16)
    sampled = torch.arange(64, 80, 4)
    last = sampled.expand(2, 4).clone()
    (got,) = net.rate(q[:, sampled], k, last, 16)
    torch.testing.assert_close(got, want[:, :, 4:5], rtol=1e-4, atol=1e-4)
    last[0, 3], broken = -1, q[:, sampled].clone()
    broken[0, 3] = torch.nan
    (three,) = net.rate(q[:, sampled[:3]], k, last[:, :3], 16)
    (got,) = net.rate(broken, k, last, 16)
    torch.testing.assert_close(got[:1], three[:1], rtol=1e-5, atol=1e-5)


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
