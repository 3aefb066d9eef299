"""Every check on a model that is broken in its way, and on a healthy one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, BlockSparseFixed
from dilated_attention_pytorch.analysis.diagnosis import (
    CHECKS,
    Diagnosis,
    diagnose,
    selection_quality,
)
from dilated_attention_pytorch.analysis.measures import join_measures, measure_selectors
from dilated_attention_pytorch.tasks.needle import (
    NeedleModel,
    NeedleRun,
    NeedleTask,
    build_needle_model,
    needle_config,
    train_needle,
)

TASK = NeedleTask(seq_len=128, num_keys=24, num_values=8)
BATCH = TASK.batch(8, torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def trained() -> NeedleModel:
    run = NeedleRun(
        "adaptive",
        needle_config(TASK),
        steps=200,
        batch_size=16,
        learning_rate=6e-3,
        task=TASK,
    )
    model = build_needle_model(run)
    (progress,) = train_needle(run, model, evaluate_every=200)
    assert progress.accuracy is not None
    assert progress.accuracy > 0.7
    return model


@pytest.fixture
def model(trained: NeedleModel) -> NeedleModel:
    return copy.deepcopy(trained)


def attention(model: NeedleModel) -> BlockSparseAdaptive:
    return model.transformer.blocks[0].attention


def bare(**settings: object) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    config = AdaptiveConfig(**{"block_size": 16, "base_sparsity": 0.8, **settings})
    return BlockSparseAdaptive(num_heads=2, head_dim=16, adaptive_config=config)


def bare_input(layer: BlockSparseAdaptive) -> Tensor:
    return torch.randn(2, 512, 2, 16, generator=torch.Generator().manual_seed(1))


def verdict(check: str, model: nn.Module, batch: object = BATCH, **options: object) -> str:
    finding = diagnose(model, batch, **options)[check]
    assert finding.evidence
    assert bool(finding.remedy) == (finding.verdict in ("warn", "fail"))
    return finding.verdict


def test_a_healthy_model_passes_every_check_that_applies(model: NeedleModel) -> None:
    diagnosis = diagnose(model, BATCH)
    assert diagnosis.healthy, str(diagnosis)
    verdicts = {finding.check: finding.verdict for finding in diagnosis.findings}
    assert len(verdicts) == len(CHECKS)
    # The needle task fixes the budget.
    assert verdicts.pop("budget") == "skip"
    assert set(verdicts.values()) == {"pass"}, str(diagnosis)
    assert diagnosis.to_dict()["healthy"]


def test_the_model_is_left_as_it_was(model: NeedleModel) -> None:
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [p.grad for p in model.parameters()]
    random = torch.get_rng_state()
    diagnose(model, BATCH)
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert "select" not in vars(attention(model))
    assert not attention(model)._forward_hooks


def test_temperature_that_never_moved(model: NeedleModel) -> None:
    attention(model).set_temperature(1.0)
    assert verdict("temperature", model) == "warn"
    still = [{"step": n, "temperature": 1.0} for n in (0, 100)]
    falling = [
        {"step": 0, "temperature": 1.0},
        {"step": 9, "loss": 1.0},
        {"step": 100, "temperature": 0.5},
    ]
    assert verdict("temperature", model, history=still) == "fail"
    assert verdict("temperature", model, history=falling) == "pass"
    hard = bare(hard_sparsity=True)
    assert verdict("temperature", hard, bare_input(hard)) == "skip"


def test_no_gradient(model: NeedleModel) -> None:
    attention(model).scorer.requires_grad_(False)
    assert verdict("gradient", model) == "fail"
    silent = bare(selector_weight=0.0)
    assert verdict("gradient", silent, bare_input(silent)) == "fail"


def test_one_silent_layer_among_two_is_named() -> None:
    layers = nn.Sequential(Once(bare()), Once(bare()))
    x = bare_input(layers[0].layer)
    assert verdict("gradient", layers, x) == "pass"
    layers[1].layer.scorer.requires_grad_(False)
    finding = diagnose(layers, x)["gradient"]
    assert finding.verdict == "fail"
    assert "1.layer" in finding.remedy
    assert "0.layer" not in finding.remedy


class Once(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.mix = layer, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        return self.layer(x, x, x, is_causal=True)


def test_attention_that_has_not_found_where_to_look() -> None:
    layer = bare()
    x = bare_input(layer)
    assert verdict("target", layer, x) == "skip", "nothing is known of it yet"
    layer.budget_state[1, 0] = 0.1
    assert verdict("target", layer, x) == "warn"
    assert "learning rate" in diagnose(layer, x)["target"].remedy
    for last, expected in ((2.4, "warn"), (2.0, "pass")):
        history = [{"loss": 2.5}, {"validation_loss": 1.0}, *[{"loss": last}] * 20]
        assert diagnose(layer, x, history=history)["target"].verdict == expected
    layer.set_base_sparsity(0.0)
    assert verdict("target", layer, x) == "skip", "its start is not over"
    layer.set_base_sparsity(0.8)
    layer.budget_state[1, 0] = 0.5
    assert verdict("target", layer, x) == "pass"


def test_a_scorer_that_learned_nothing(model: NeedleModel) -> None:
    torch.manual_seed(0)
    attention(model).scorer.reset_parameters()
    assert verdict("selection", model) == "fail"


def test_mean_pooling_that_would_choose_better(trained: NeedleModel) -> None:
    (measure,) = measure_selectors(trained, BATCH)
    assert selection_quality([measure], []).verdict == "pass"
    order = measure.mass.masked_fill(~measure.scorable, -1).argsort(-1, descending=True)
    best = measure.scorable & (order.argsort(-1) < measure.chosen.sum(-1, keepdim=True))
    assert selection_quality([replace(measure, by_mean_pooling=best)], []).verdict == "warn"


def test_scores_that_ignore_the_content(model: NeedleModel) -> None:
    with torch.no_grad():
        attention(model).scorer.gain.zero_()
    assert verdict("input dependence", model) == "fail"
    one = TASK.batch(1, torch.Generator().manual_seed(5))
    assert verdict("input dependence", model, one) == "skip"


@pytest.mark.parametrize(
    ("factor", "base", "expected"),
    [(1.0, 0.8, "pass"), (1.8, 0.8, "warn"), (2.0, 0.6, "warn"), (-1.0, 0.5, "fail")],
)
def test_sparsity_off_its_target(factor: float, base: float, expected: str) -> None:
    layer = bare(base_sparsity=base)
    with torch.no_grad():
        layer.budget_offset.fill_(factor)
        layer.budget_gain.zero_()
    assert verdict("sparsity", layer, bare_input(layer)) == expected


def test_nothing_left_to_choose_is_a_failure_and_all_of_it_is_not() -> None:
    """It was skipped, as if there were nothing wrong."""
    layer = bare(base_sparsity=0.99)
    finding = diagnose(layer, bare_input(layer))["selection"]
    assert finding.verdict == "fail"
    assert "no row chooses anything" in finding.evidence
    assert "block_size" in finding.remedy
    layer.set_base_sparsity(0.0)
    assert verdict("selection", layer, bare_input(layer)) == "skip"


def test_forced_blocks_that_exceed_the_budget() -> None:
    layer = BlockSparseAdaptive(
        num_heads=2,
        head_dim=16,
        adaptive_config=AdaptiveConfig(block_size=16, base_sparsity=0.9, num_local_blocks=6),
    )
    assert verdict("sparsity", layer, bare_input(layer)) == "fail"


def test_heads_collapsed_onto_each_other(model: NeedleModel) -> None:
    block, layer = model.transformer.blocks[0], attention(model)
    with torch.no_grad():
        qkv = block.qkv.weight.view(3, layer.num_heads, layer.head_dim, -1)
        qkv[:, 1] = qkv[:, 0]
        layer.scorer.query_in[1] = layer.scorer.query_in[0]
        layer.scorer.key_in[1] = layer.scorer.key_in[0]
    assert verdict("head collapse", model) == "fail"
    shared = bare(share_across_heads=True)
    assert verdict("head collapse", shared, bare_input(shared)) == "skip"


def test_a_scorer_that_prefers_the_worst_blocks(model: NeedleModel) -> None:
    with torch.no_grad():
        attention(model).scorer.gain.neg_()
    assert verdict("kept mass", model) == "fail"


def test_attention_that_no_choice_can_hold() -> None:
    layer = bare(base_sparsity=0.9)
    assert verdict("kept mass", layer, 0.01 * bare_input(layer)) == "warn"
    (measures,) = measure_selectors(layer, 0.01 * bare_input(layer))
    assert 0 < measures.peak_recall < 1
    found = diagnose(layer, 0.01 * bare_input(layer))["kept mass"]
    assert f"one query asks for most: {measures.peak_recall:.2f}" in found.evidence


@pytest.mark.parametrize("offset", [5.0, -5.0])
def test_a_budget_that_ran_away(offset: float) -> None:
    layer = bare()
    assert verdict("budget", layer, bare_input(layer)) == "pass"
    with torch.no_grad():
        layer.budget_offset.fill_(offset)
    assert verdict("budget", layer, bare_input(layer)) == "fail"


def test_numbers_that_are_not_finite(model: NeedleModel) -> None:
    with torch.no_grad():
        model.transformer.blocks[0].query_norm.weight.mul_(200)
    assert verdict("finite", model) == "warn"
    with torch.no_grad():
        model.transformer.blocks[0].query_norm.weight.mul_(100)
    assert verdict("finite", model) == "fail"
    with torch.no_grad():
        attention(model).scorer.query_in[0, 0, 0] = torch.nan
    finding = diagnose(model, BATCH)["finite"]
    assert finding.verdict == "fail"
    assert "NaN" in finding.evidence


def test_losses() -> None:
    layer = bare()
    x = bare_input(layer)
    silent = diagnose(layer, x, loss_function=lambda m, b: m(b, b, b).sum() * 0)
    assert silent["gradient"].verdict == "fail"

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = bare()

        def forward(self, x: Tensor) -> str:
            self.layer(x, x, x)
            return "words"

    with pytest.raises(TypeError, match="loss_function"):
        diagnose(Words(), x)


def test_models_that_cannot_be_diagnosed() -> None:
    with pytest.raises(ValueError, match="BlockSparseAdaptive"):
        diagnose(BlockSparseFixed("local", num_heads=2, head_dim=16), torch.randn(1, 512, 2, 16))
    packed = {"query": torch.randn(1, 512, 2, 16), "cu_seqlens": torch.tensor([0, 100, 512])}
    packed["key"] = packed["value"] = packed["query"]
    with pytest.raises(ValueError, match="cu_seqlens"):
        diagnose(bare(), packed)


def test_measures_of_several_batches_join_to_those_of_one(model: NeedleModel) -> None:
    parts = [TASK.batch(2, torch.Generator().manual_seed(n)) for n in (1, 2)]
    measured = [measure_selectors(model, part) for part in parts]
    (joined,) = join_measures(measured)
    (first,), (second,) = measured
    for name in ("kept", "chosen", "scorable", "by_mean_pooling", "mass", "scores"):
        both = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(getattr(joined, name), both), name
    assert joined.name == first.name
    assert joined.density == pytest.approx((first.density + second.density) / 2)
    assert joined.gradient == pytest.approx((first.gradient + second.gradient) / 2)
    assert joined.largest_logit == max(first.largest_logit, second.largest_logit)
    bad = replace(second, finite_output=False, gradient=None)
    (joined,) = join_measures([[first], [bad]])
    assert not joined.finite_output
    assert joined.gradient == first.gradient


def test_a_check_that_makes_no_sense_says_so(model: NeedleModel) -> None:
    attention(model).set_temperature(1.0)
    measures = measure_selectors(model, BATCH)
    assert Diagnosis.of(measures)["temperature"].verdict == "warn"
    found = Diagnosis.of(measures, inapplicable={"temperature": "nothing is annealed"})
    assert found["temperature"].verdict == "skip"
    assert found["temperature"].evidence == "nothing is annealed"
    assert found["temperature"].remedy == ""
    assert found["gradient"] == Diagnosis.of(measures)["gradient"]


def test_rows_without_a_choice_are_named_as_the_cause() -> None:
    layer = bare(num_sink_blocks=1, budget="fixed", base_sparsity=0.9, num_explore_blocks=0)
    finding = diagnose(layer, torch.randn(2, 256, 2, 16))["gradient"]
    assert finding.verdict == "fail"
    assert "forced blocks take their budget" in finding.remedy
    (measures,) = measure_selectors(layer, torch.randn(2, 256, 2, 16))
    assert not measures.free.any()
