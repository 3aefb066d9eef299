"""Prototypes: the formula by loops, padding, chunks, sharing, and what the layer makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.scoring import prototypes as module
from dilated_attention_pytorch.scoring.prototypes import PrototypeScorer, block_prototypes


def tokens(heads: int, length: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, heads, 8, generator=generator)


def scorer(**options: object) -> PrototypeScorer:
    torch.manual_seed(0)
    out = PrototypeScorer(4, 8, 2, **{"num_prototypes": 3, "scale": 0.6, **options})
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return out


def test_prototypes_are_attention_pooled_tokens() -> None:
    x, u = tokens(2), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    found = block_prototypes(x, 16, u)
    assert found.shape == (2, 2, 3, 3, 8)
    part = x[1, 32:, 1]
    torch.testing.assert_close(found[1, 1, 2, 0], (part @ u[1, 0]).softmax(0) @ part)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 20:] = False
    padded = block_prototypes(x, 16, u, valid)
    part = x[1, 16:20, 1]
    torch.testing.assert_close(padded[1, 1, 1, 0], (part @ u[1, 0]).softmax(0) @ part)
    assert bool((padded[1, :, 2] == 0).all())


def test_scores_are_the_log_sum_exp_of_all_pairs() -> None:
    net = scorer()
    found = net(tokens(4), tokens(2, seed=5), 16)
    q = block_prototypes(tokens(4), 16, net.query_pool)
    k = block_prototypes(tokens(2, seed=5), 16, net.key_pool)
    h, i, j = 3, 1, 2
    pairs = [
        0.6 * net.gain[h] * q[1, h, i, r] @ net.form[h] @ k[1, 1, j, p] + net.bias[h, r, p]
        for r in range(3)
        for p in range(3)
    ]
    torch.testing.assert_close(found[1, h, i, j], torch.stack(pairs).logsumexp(0))


def test_chunks_candidates_and_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = scorer()
    x, y = tokens(4), tokens(2, seed=5)
    whole = net(x, y, 16)
    grads = torch.autograd.grad(whole.square().sum(), list(net.parameters()))
    monkeypatch.setattr(module, "_CHUNK", 1)
    chunked = net(x, y, 16)
    torch.testing.assert_close(chunked, whole)
    again = torch.autograd.grad(chunked.square().sum(), list(net.parameters()))
    for a, b in zip(grads, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    chosen = torch.tensor([2, 0]).view(1, 1, 1, 2).expand(1, 1, 3, 2)
    assert torch.equal(net(x, y, 16, chosen), whole[..., [2, 0]])
    shared = scorer(heads_per_pattern=2)(x, y, 16)
    torch.testing.assert_close(shared, whole.unflatten(1, (2, 2)).mean(2))


def test_encoded_blocks_compare_as_tokens_do() -> None:
    x, y, valid = tokens(4), tokens(2, seed=5), torch.arange(40)[None] < 30
    chosen = torch.tensor([2, 0]).view(1, 1, 1, 2).expand(1, 1, 3, 2)
    for share in (1, 2, 4):
        net = scorer(heads_per_pattern=share)
        q, k = net.encode_queries(x, 16, valid), net.encode_keys(y, 16, valid)
        for candidates in (None, chosen):
            wanted = net(x, y, 16, candidates, query_valid=valid, key_valid=valid)
            torch.testing.assert_close(net.compare(q, k, candidates), wanted)


def test_untrained_prototypes_of_one_token_are_the_logits() -> None:
    net = PrototypeScorer(4, 8, 2, num_prototypes=1, scale=0.5)
    x, y = tokens(4), tokens(2, seed=5)
    logits = 0.5 * torch.einsum("bnhd,bmhd->bhnm", x, y.repeat_interleave(2, 2))
    torch.testing.assert_close(net(x, y, 1), logits)


def test_the_layer_learns_its_prototypes() -> None:
    config = AdaptiveConfig(
        scorer="prototypes", pooling=("attention",), num_prototypes=3, block_size=16,
        base_sparsity=0.3,
    )  # fmt: skip
    layer = BlockSparseAdaptive(num_heads=4, head_dim=8, num_kv_heads=2, adaptive_config=config)
    assert layer.scorer.query_pool.shape == (4, 3, 8)
    y = tokens(2, 120, 5)
    layer(tokens(4, 120), y, y, is_causal=True).square().sum().backward()
    named = dict(layer.scorer.named_parameters())
    assert all(bool(p.grad.abs().sum() > 0) for p in named.values())
    with pytest.raises(ValueError, match="pooling must be"):
        AdaptiveConfig(scorer="prototypes")
