"""The calls of the user's guide run as written, and what it promises shows in numbers."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import (
    AdaptiveConfig,
    AdaptiveSparsityTrainer,
    BlockPattern,
    BlockSparseAdaptive,
    BlockSparseFixed,
    ImportanceScorer,
    block_summaries,
    create_adaptive_block_sparse,
    get_adaptive_sparsity,
    get_sparsity_loss,
    gumbel_softmax_topk,
)


def guide_config() -> AdaptiveConfig:
    return AdaptiveConfig(
        base_sparsity=0.9,
        temperature=1.0,
        learnable_temperature=True,
        min_temperature=0.1,
        hidden_dim=128,
        num_layers=2,
        share_across_heads=False,
        hard_sparsity=False,
    )


class LanguageModel(nn.Module):
    """The smallest model that a training loop can train."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).unflatten(-1, (4, 16))
        return self.attention(x, x, x, is_causal=True).flatten(2)


def small(**settings: object) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    config = AdaptiveConfig(**{"block_size": 16, "base_sparsity": 0.8, **settings})
    return BlockSparseAdaptive([256, 512], [1, 2], 4, 16, config)


def test_basic_usage() -> None:
    attention = create_adaptive_block_sparse(
        embed_dim=768,
        num_heads=12,
        segment_lengths=[2048, 4096, 8192],
        dilation_rates=[1, 2, 4],
    )
    query, key, value = torch.randn(3, 1, 1024, 12, 64)
    output = attention(query, key, value)
    assert output.shape == query.shape
    output, pattern_info = attention(query, key, value, return_pattern=True)
    patterns = pattern_info["patterns"]
    assert output.shape == query.shape
    assert isinstance(patterns, list)
    assert len(patterns) == 12
    assert all(isinstance(pattern, BlockPattern) for pattern in patterns)


def test_custom_configuration() -> None:
    config = guide_config()
    attention = BlockSparseAdaptive(
        segment_lengths=[2048, 4096],
        dilation_rates=[1, 2],
        num_heads=12,
        head_dim=64,
        adaptive_config=config,
    )
    assert attention.config == config
    x = torch.randn(1, 512, 12, 64)
    attention(x, x, x).sum().backward()
    assert attention.scorer.query_in.grad is not None


def test_training_loop_with_annealing_and_regularisation() -> None:
    attention = small()
    model = LanguageModel(attention)
    trainer = AdaptiveSparsityTrainer(
        model=attention,
        initial_temperature=1.0,
        final_temperature=0.1,
        annealing_steps=8,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = attention.scorer.query_in.detach().clone()
    temperatures, losses = [], []
    x = torch.randn(2, 300, 64)
    for _ in range(8):
        task_loss = (model(x) - x).square().mean()
        total_loss = task_loss + 0.01 * attention.get_sparsity_loss()
        optimizer.zero_grad()
        total_loss.backward()
        optimizer.step()
        trainer.step()
        temperatures.append(attention.temperature.item())
        losses.append(task_loss.item())
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[-1] == pytest.approx(0.1)
    assert losses[-1] < losses[0]
    assert not torch.equal(attention.scorer.query_in, before), "the scorer learns"
    assert get_sparsity_loss(model).item() == attention.get_sparsity_loss().item()


def test_annealing_moves_from_exploration_to_exploitation() -> None:
    """Two draws agree ever more as the temperature falls, and at last equal the evaluation."""
    layer = small(num_explore_blocks=0, min_temperature=1e-4)
    trainer = AdaptiveSparsityTrainer(layer, 10.0, 1e-4, annealing_steps=3, dense_steps=0)
    x = torch.randn(1, 512, 4, 16)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        # A pass in training moves the budgets of the next one.
        twin = copy.deepcopy(layer)
        return twin(x, x, x, generator=generator, return_pattern=True)[1]["pattern"].to_dense()

    agreements = []
    for _ in range(4):
        one, two = draw(0), draw(1)
        agreements.append(float((one & two).sum() / (one | two).sum()))
        trainer.step()
    assert agreements[0] < agreements[2] <= agreements[3]
    assert agreements[3] > 0.99
    final = draw(0)
    layer.eval()
    assert float((final & draw(0)).sum() / final.sum()) > 0.99


def test_a_trainer_can_be_made_before_the_model() -> None:
    total_steps = 400
    trainer = AdaptiveSparsityTrainer(annealing_steps=total_steps // 4)
    trainer.attach(small())
    for _ in range(total_steps // 4):
        trainer.step()
    assert trainer.temperature == 0.1


def test_pattern_analysis() -> None:
    trainer = AdaptiveSparsityTrainer(LanguageModel(small()), annealing_steps=9)
    val_dataloader = torch.utils.data.DataLoader(torch.randn(6, 256, 64), batch_size=2)
    pattern_stats = trainer.analyze_patterns(dataloader=val_dataloader, num_samples=100)
    assert f"{np.mean(pattern_stats['sparsity_ratios']):.2%}".endswith("%")
    assert 0 < np.mean(pattern_stats["pattern_diversity"]) < 1
    assert 0 < np.mean(pattern_stats["head_similarity"]) < 1


def test_simple_input_is_sparser_than_varied_input() -> None:
    torch.manual_seed(0)
    model = create_adaptive_block_sparse(768, 12).eval()
    sparsity = {}
    for length, tolerance in ((1024, 0.06), (4096, 0.01)):
        simple_input = torch.ones(1, length, 12, 64)
        complex_input = torch.randn(1, length, 12, 64)
        for name, x in (("simple", simple_input), ("complex", complex_input)):
            _, patterns = model(x, x, x, return_pattern=True)
            sparsity[name] = patterns["sparsity"].mean().item()
        # At 1,024 tokens the diagonal alone is 1/16 of the tiles.
        assert sparsity["simple"] == pytest.approx(min(0.95, 1 - 64 / length), abs=0.01)
        assert sparsity["complex"] == pytest.approx(0.85, abs=tolerance)


def test_patterns_adapt_to_the_input() -> None:
    layer = small().eval()
    one, two = (layer(x, x, x, return_pattern=True)[1]["pattern"].to_dense()
                for x in torch.randn(2, 1, 512, 4, 16))  # fmt: skip
    assert not torch.equal(one, two)


def test_heads_specialise_unless_shared() -> None:
    x = torch.randn(1, 512, 4, 16)
    for shared in (False, True):
        _, info = small(share_across_heads=shared).eval()(x, x, x, return_pattern=True)
        heads = [pattern.to_dense() for pattern in info["patterns"]]
        same = [torch.equal(a, b) for a, b in itertools.combinations(heads, 2)]
        assert all(same) if shared else not any(same)


@pytest.mark.parametrize("kind", ["bilinear", "mlp"])
def test_scoring_and_selecting_by_hand(kind: str) -> None:
    """Block summaries, a scorer on concatenated pairs, and a differentiable top-k."""
    query, key = torch.randn(2, 1, 512, 4, 16)
    query_summary, key_summary = (block_summaries(x, 64, pooling=("mean",)) for x in (query, key))
    pairs = torch.cat(
        [
            query_summary.repeat_interleave(8, 1),
            key_summary.repeat(1, 8, 1, 1),
        ],
        -1,
    )
    scorer = ImportanceScorer(summary_dim=16, num_heads=4, kind=kind, hidden_dim=32, num_layers=2)
    importance_score = scorer(pairs).unflatten(-1, (8, 8))
    torch.testing.assert_close(importance_score, scorer(query_summary, key_summary))
    selected = gumbel_softmax_topk(importance_score, k=3)
    assert selected.shape == (1, 4, 8, 8)
    assert torch.equal(selected.sum(-1), torch.full((1, 4, 8), 3.0))
    (selected * torch.randn(8, 8)).sum().backward()
    assert scorer.query_in.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "soft"},
        {"estimator": "gumbel"},
        {"estimator": "soft", "hard_sparsity": True},
        {"estimator": "straight_through", "hard_sparsity": True},
        {"estimator": "mass", "hard_sparsity": True},
    ],
)
def test_gradients_flow_through_every_kind_of_selection(settings: dict) -> None:
    layer = small(**settings)
    # A pass in training moves the budgets of the next one.
    before = copy.deepcopy(layer).eval()
    x = torch.randn(1, 512, 4, 16)
    out, info = layer(x, x, x, return_pattern=True)
    out.square().sum().backward()
    assert layer.scorer.query_in.grad.abs().sum() > 0
    hard = info["pattern"].to_dense()
    _, evaluated = before(x, x, x, return_pattern=True)
    same = torch.equal(hard, evaluated["pattern"].to_dense())
    assert same is settings.get("hard_sparsity", False)


def test_sparsity_grows_with_the_length() -> None:
    assert [get_adaptive_sparsity(n) for n in (512, 2048, 8192)] == [0.8, 0.9, 0.95]
    layer = small(budget="fixed")
    for length in (512, 1024):
        layer.set_base_sparsity(get_adaptive_sparsity(length))
        x = torch.randn(1, length, 4, 16)
        _, info = layer.eval()(x, x, x, return_pattern=True)
        expected = get_adaptive_sparsity(length)
        assert info["sparsity"].mean().item() == pytest.approx(expected, abs=0.002)


def test_adaptive_within_a_hierarchy() -> None:
    """Fine: every block of a short segment. Coarse: every fourth of a long one."""
    config = AdaptiveConfig(block_size=16, base_sparsity=0.0)
    layer = BlockSparseAdaptive([64, 512], [1, 4], 1, 16, config).eval()
    x = torch.randn(1, 512, 1, 16)
    _, info = layer(x, x, x, return_pattern=True)
    i, j = torch.arange(32)[:, None], torch.arange(32)
    reachable = (i // 4 == j // 4) | (j % 4 == 0)
    assert torch.equal(info["pattern"].to_dense()[0, 0], reachable)


def test_block_size_is_the_patterns() -> None:
    config = AdaptiveConfig(block_size=64)
    layer = create_adaptive_block_sparse(64, 4, adaptive_config=config)
    x = torch.randn(1, 300, 4, 16)
    _, info = layer(x, x, x, return_pattern=True)
    assert info["pattern"].block_size == (64, 64)


def test_fixed_and_adaptive_compare_at_one_sparsity() -> None:
    x = torch.randn(1, 1024, 4, 16)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.9, budget="fixed")
    adaptive = BlockSparseAdaptive(None, None, 4, 16, config).eval()
    fixed = BlockSparseFixed("local", 4, 16, base_sparsity=0.9, block_size=16)
    sparsities = [m(x, x, x, return_pattern=True)[1]["sparsity"].mean() for m in (adaptive, fixed)]
    torch.testing.assert_close(*sparsities)
