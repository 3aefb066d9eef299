"""The adaptive layer: sparsity follows content, nothing leaks, the scorer hears of the loss."""

import copy

import pytest
import torch

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    BlockSparseFixed,
    create_adaptive_block_sparse,
)
from dilated_attention_pytorch.models import DenseAttention
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.train import AdaptiveSparsityTrainer


def small(**changes):
    settings = {"block_size": 16, "base_sparsity": 0.6, **changes}
    return BlockSparseAdaptive(None, None, 4, 16, AdaptiveConfig(**settings))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize(
    ("content", "expected"),
    # What all keys have in common hides what sets them apart; zeros have no direction.
    [("ones", 0.95), ("randn", 0.85), ("rand", 0.95), ("zeros", 0.85)],
)
def test_sparsity_follows_content(causal, segments, content, expected):
    torch.manual_seed(0)
    options = {} if segments else {"segment_lengths": None, "dilation_rates": None}
    layer = create_adaptive_block_sparse(768, 12, **options).eval()
    x = getattr(torch, content)(1, 4096, 12, 64)
    with torch.no_grad():
        _, info = layer(x, x, x, is_causal=causal, return_pattern=True)
    assert info["sparsity"].shape == (1, 12)
    assert len(info["patterns"]) == 12
    assert (info["sparsity"] - expected).abs().max() < 0.01


@pytest.mark.parametrize("scope", ["block", "past"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("content", ["ones", "rand", "zeros"])
def test_nothing_is_left_out_at_sparsity_zero(content, causal, scope):
    """Whatever the content; a warm-up from dense begins with dense attention."""
    x = getattr(torch, content)(2, 300, 4, 16)
    dense = DenseAttention()(x, x, x, is_causal=causal)
    layer = small(query_scope=scope)
    AdaptiveSparsityTrainer(layer, annealing_steps=9, dense_steps=2, sparsity_warmup_steps=2)
    for ready in (small(base_sparsity=0.0, query_scope=scope), layer):
        for mode in (True, False):
            ready.train(mode)
            out, info = ready(x, x, x, is_causal=causal, return_pattern=True)
            assert (info["sparsity"] == 0).all()
            torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
        assert float(ready.get_sparsity_loss()) == 0


@torch.no_grad()
@pytest.mark.parametrize("scope", ["block", "past"])
def test_nothing_is_left_out_of_a_cache_at_sparsity_zero(scope):
    layer, state = small(base_sparsity=0.0, query_scope=scope).eval(), SelectorState()
    x = torch.rand(1, 90, 4, 16)
    dense = DenseAttention()(x, x, x, is_causal=True)
    out = [layer.prefill(x[:, :50], x[:, :50], x[:, :50], state)]
    for n in range(50, 90):
        seen = x[:, : n + 1]
        out.append(layer.decode(x[:, n : n + 1], seen, seen, state))
    torch.testing.assert_close(torch.cat(out, 1), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 64, 4, 16), (2, 0, 4, 16)])
def test_an_empty_input_trains(shape):
    for layer in (small(), small(hard_sparsity=True), small(hierarchy=(2,), budget="fixed")):
        x = torch.randn(*shape, requires_grad=True)
        layer(x, x, x, is_causal=True).sum().backward()
        assert x.grad.shape == shape


def test_repeated_half_is_sparser():
    torch.manual_seed(0)
    layer = create_adaptive_block_sparse(768, 12).eval()
    x = torch.randn(1, 4096, 12, 64)
    x[:, :2048] = x[:, :64].repeat(1, 32, 1, 1)
    for causal in (False, True):
        _, info = layer(x, x, x, is_causal=causal, return_pattern=True)
        blocks = info["pattern"].kv_num_blocks.float()
        assert blocks[..., 32:].mean() > 1.3 * blocks[..., :32].mean()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layer", [small(), BlockSparseFixed("strided", 4, 16, block_size=16)])
def test_packed_documents_equal_each_alone(layer, causal):
    layer.eval()
    x = torch.randn(1, 300, 4, 16)
    out = layer(x, x, x, is_causal=causal, cu_seqlens=torch.tensor([0, 100, 117, 260]))
    for start, end in ((0, 100), (100, 117), (117, 260)):
        one = x[:, start:end]
        alone = layer(one, one, one, is_causal=causal)
        torch.testing.assert_close(out[:, start:end], alone, atol=1e-5, rtol=1e-5)
    assert (out[:, 260:] == 0).all()


def test_padding_changes_nothing():
    layer = small().eval()
    x = torch.randn(2, 200, 4, 16)
    out = layer(x, x, x, is_causal=True, key_lengths=torch.tensor([200, 90]))
    alone = layer(x[1:, :90], x[1:, :90], x[1:, :90], is_causal=True)
    torch.testing.assert_close(out[1:, :90], alone, atol=1e-5, rtol=1e-5)
    assert (out[1, 90:] == 0).all()


@pytest.mark.parametrize("scope", ["block", "past"])
def test_future_and_other_samples_do_not_leak(scope):
    layer = small(query_scope=scope).eval()
    x = torch.randn(2, 160, 4, 16)
    changed = x.clone()
    changed[0, 100:] = torch.randn(60, 4, 16) * 5
    before, after = (layer(y, y, y, is_causal=True) for y in (x, changed))
    clean = 100 if scope == "past" else 96
    assert torch.equal(before[0, :clean], after[0, :clean])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])
    broken = x.clone()
    broken[0, 20] = torch.nan
    assert layer(broken, broken, broken)[1].isfinite().all()


@pytest.mark.parametrize("estimator", ["mass", "gumbel", "soft", "straight_through"])
@pytest.mark.parametrize("scorer", ["bilinear", "mlp"])
def test_every_estimator_reaches_the_scorer(estimator, scorer):
    layer = small(estimator=estimator, scorer=scorer)
    x = torch.randn(2, 160, 4, 16, requires_grad=True)
    layer(x, x, x, is_causal=True).square().sum().backward()
    assert layer.scorer.query_in.grad.abs().sum() > 0
    assert x.grad.isfinite().all()


def test_sparsity_loss_is_zero_at_the_target_and_pulls_from_both_sides():
    layer = small()
    with pytest.raises(RuntimeError, match="forward"):
        layer.get_sparsity_loss()
    x = torch.randn(1, 512, 4, 16)
    for offset, sign in ((0.1, -1), (1.5, 1)):
        with torch.no_grad():
            layer.budget_offset.fill_(offset)
            layer.budget_gain.zero_()
        # Each pass of a layer moves its budgets towards the target.
        first = copy.deepcopy(layer)
        first(x, x, x)
        loss = first.get_sparsity_loss()
        loss.backward()
        assert loss > 0
        assert (first.budget_offset.grad.sign() == sign).all()
    with torch.no_grad():
        layer.budget_offset.fill_(1)
    layer(x, x, x)
    assert layer.get_sparsity_loss() < 1e-9


def test_selector_inputs_choose_the_blocks():
    layer = small().eval()
    x = torch.randn(1, 320, 4, 16)
    other = torch.randn_like(x)
    _, plain = layer(x, x, x, return_pattern=True)
    _, same = layer(other, other, x, selector_query=x, selector_key=x, return_pattern=True)
    assert torch.equal(plain["pattern"].kv_indices, same["pattern"].kv_indices)
    with pytest.raises(ValueError, match="selector_query"):
        layer(x, x, x, selector_query=x[:, :10])


def test_trainer_anneals_resumes_and_analyses():
    layer = small()
    trainer = AdaptiveSparsityTrainer(layer, 1.0, 0.1, 10, sparsity_warmup_steps=4)
    assert float(layer.base_sparsity) == 0
    for _ in range(5):
        trainer.step()
    assert float(layer.base_sparsity) == pytest.approx(0.6)
    other = AdaptiveSparsityTrainer(copy.deepcopy(layer), annealing_steps=1)
    other.load_state_dict(trainer.state_dict())
    assert other.step() == trainer.step()
    stats = trainer.analyze_patterns([torch.randn(2, 160, 4, 16) for _ in range(3)], 4)
    assert len(stats["sparsity_ratios"]) == 16
    assert len(stats["pattern_diversity"]) == 4
    assert len(stats["head_similarity"]) == 4 * 6
    assert AdaptiveSparsityTrainer(annealing_steps=3).current_step == 0


def test_edges():
    layer = small()
    assert layer(*(torch.randn(0, 32, 4, 16),) * 3).shape == (0, 32, 4, 16)
    assert layer(*(torch.randn(1, 1, 4, 16),) * 3).shape == (1, 1, 4, 16)
    q, k = torch.randn(1, 40, 4, 16), torch.randn(1, 90, 4, 16)
    assert layer(q, k, k).shape == q.shape
    with pytest.raises(ValueError, match="head_dim"):
        layer(*(torch.randn(1, 8, 4, 8),) * 3)
    with pytest.raises(ValueError, match="segment_lengths"):
        BlockSparseAdaptive([64], [1, 2])
    with pytest.raises(ValueError, match="num_kv_heads"):
        BlockSparseAdaptive(num_heads=4, num_kv_heads=3)
