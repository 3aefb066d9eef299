"""Schedules of temperature and sparsity, and groups of parameters that do not decay."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import (
    AdaptiveConfig,
    AdaptiveSparsityTrainer,
    BlockSparseAdaptive,
    BlockSparseFixed,
    parameter_groups,
)
from dilated_attention_pytorch.scoring import ImportanceScorer
from dilated_attention_pytorch.train.trainer import SCHEDULES


def make(**settings: object) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    config = AdaptiveConfig(**{"block_size": 8, "base_sparsity": 0.6, **settings})
    return BlockSparseAdaptive(None, None, 2, 8, config)


class Model(nn.Module):
    """Two adaptive layers, one of them in evaluation mode for good, and a fixed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make(), make(base_sparsity=0.3)
        self.fixed = BlockSparseFixed("local", 2, 8, block_size=8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        x = self.dropout(x * scale + shift)
        for layer in (self.first, self.second, self.fixed):
            x = x + layer(x, x, x, is_causal=True)
        return x


@pytest.mark.parametrize(
    ("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55), ("exponential", math.sqrt(0.1))]
)
def test_anneals_from_the_initial_to_the_final_temperature(schedule: str, middle: float) -> None:
    layer = make(temperature=7.0)
    trainer = AdaptiveSparsityTrainer(layer, 1.0, 0.1, 10, schedule=schedule)
    assert layer.temperature.item() == 1.0
    seen = [trainer.step() for _ in range(12)]
    assert seen[4] == pytest.approx(middle)
    assert seen[9:] == [0.1] * 3
    assert seen == sorted(seen, reverse=True)
    assert layer.temperature.item() == pytest.approx(0.1)


def test_unless_named_temperatures_are_those_of_each_config() -> None:
    """It set all layers to 1.0 and 0.1, whatever they had been made with."""
    model = nn.ModuleList([make(temperature=0.3, min_temperature=0.2), make(temperature=2.0)])
    trainer = AdaptiveSparsityTrainer(model, annealing_steps=2, schedule="linear")
    seen = []
    for _ in range(3):
        seen.append([layer.temperature.item() for layer in model])
        trainer.step()
    for got, want in zip(seen, ([0.3, 2.0], [0.25, 1.05], [0.2, 0.1]), strict=True):
        assert got == pytest.approx(want)
    assert trainer.temperature == 0.2


def test_at_the_end_training_reads_what_evaluation_reads() -> None:
    """Three times the annealing by default; random blocks stayed to the last step before."""
    layer = make(num_explore_blocks=2, base_sparsity=0.6)
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=2, dense_steps=0)
    x, seen = torch.randn(1, 256, 2, 8), []
    for _ in range(8):
        trainer.step()
        # The budgets that a pass in training takes, without moving them for the next one.
        twin = copy.deepcopy(layer)
        patterns = [
            twin.train(training)(x, x, x, is_causal=True, return_pattern=True)[1]["pattern"]
            for training in (False, True)
        ]
        seen.append(torch.equal(*(pattern.to_dense() for pattern in patterns)))
    assert seen == [False] * 5 + [True] * 3
    assert not layer.explores
    assert float(layer.effective_temperature().detach()) == 0
    again = make(num_explore_blocks=2)
    assert again.explores
    again.load_state_dict(layer.state_dict())
    assert not again.explores, "saved with the weights"
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=2, explore_steps=4)
    assert layer.explores
    assert [trainer.step() > 0 for _ in range(5)] == [True] * 3 + [False] * 2


def test_estimators_that_need_noise_keep_it() -> None:
    layer = make(estimator="gumbel")
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=1)
    assert [trainer.step() for _ in range(5)] == [0.1] * 5
    with pytest.raises(ValueError, match="needs estimator='mass'"):
        layer.end_exploration()


def test_the_layer_multiplies_its_learned_factor() -> None:
    layer = make(min_temperature=0.05)
    trainer = AdaptiveSparsityTrainer(layer, 1.0, 0.2, annealing_steps=1)
    with torch.no_grad():
        layer.log_temperature.fill_(math.log(0.5))
    assert layer.effective_temperature().item() == pytest.approx(0.5)
    trainer.step()
    assert layer.effective_temperature().item() == pytest.approx(0.1)
    assert layer.log_temperature.item() == pytest.approx(math.log(0.5)), "the trainer touched it"


def test_every_adaptive_layer_of_a_model_is_set() -> None:
    model = Model()
    trainer = AdaptiveSparsityTrainer(model, 1.0, 0.1, 2, schedule="linear")
    trainer.step()
    for layer in (model.first, model.second):
        assert layer.temperature.item() == pytest.approx(0.55)


def test_sparsity_warm_up() -> None:
    model = Model()
    trainer = AdaptiveSparsityTrainer(
        model, annealing_steps=9, sparsity_warmup_steps=4, dense_steps=2, initial_sparsity=0.1
    )
    seen = [(model.first.base_sparsity.item(), model.second.base_sparsity.item())]
    for _ in range(8):
        trainer.step()
        seen.append((model.first.base_sparsity.item(), model.second.base_sparsity.item()))
    for column, goal in ((0, 0.6), (1, 0.3)):
        values = [pair[column] for pair in seen]
        assert values[:3] == pytest.approx([0.1] * 3)
        assert values[6:] == pytest.approx([goal] * 3)
        assert values[4] == pytest.approx(1 - math.sqrt(0.9 * (1 - goal)))
        assert values == sorted(values)


def test_dense_steps_alone() -> None:
    layer = make()
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=9, dense_steps=2)
    seen = [layer.base_sparsity.item()]
    for _ in range(3):
        trainer.step()
        seen.append(layer.base_sparsity.item())
    assert seen == pytest.approx([0.0, 0.0, 0.6, 0.6])


def test_without_warm_up_the_sparsity_is_left_alone() -> None:
    layer = make()
    layer.set_base_sparsity(0.25)
    AdaptiveSparsityTrainer(layer, annealing_steps=9).step()
    assert layer.base_sparsity.item() == pytest.approx(0.25)
    counted = make(budget="fixed", num_selected_blocks=2)
    AdaptiveSparsityTrainer(counted, annealing_steps=9).step()


def test_resume_is_exact() -> None:
    options = {"annealing_steps": 9, "schedule": "cosine", "sparsity_warmup_steps": 5,
               "dense_steps": 1, "initial_sparsity": 0.2}  # fmt: skip
    straight = AdaptiveSparsityTrainer(make(), 2.0, 0.3, **options)
    broken = AdaptiveSparsityTrainer(make(), 2.0, 0.3, **options)
    for _ in range(4):
        straight.step()
        broken.step()
    state = json.loads(json.dumps(broken.state_dict()))
    layer = make()
    resumed = AdaptiveSparsityTrainer(layer, annealing_steps=9)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == straight.state_dict()
    assert layer.temperature.item() == pytest.approx(straight.temperature)
    reference = straight.model
    assert isinstance(reference, BlockSparseAdaptive)
    for _ in range(8):
        assert resumed.step() == straight.step()
        assert torch.equal(layer.temperature, reference.temperature)
        assert torch.equal(layer.base_sparsity, reference.base_sparsity)
    for bad in ({}, {**state, "extra": 1}):
        with pytest.raises(ValueError, match="state"):
            resumed.load_state_dict(bad)
    before = resumed.state_dict()
    with pytest.raises(ValueError, match="schedule must be one of"):
        resumed.load_state_dict({**state, "current_step": 9, "schedule": "sudden"})
    assert resumed.state_dict() == before


def test_a_model_can_come_later() -> None:
    trainer = AdaptiveSparsityTrainer(annealing_steps=4, schedule="linear")
    for call in (trainer.step, lambda: trainer.analyze_patterns([])):
        with pytest.raises(RuntimeError, match="model"):
            call()
    state = {**trainer.state_dict(), "current_step": 2}
    trainer.load_state_dict(state)
    layer = make()
    trainer.attach(layer)
    assert layer.temperature.item() == pytest.approx(0.55)
    assert trainer.step() == pytest.approx(0.325)


def test_batches_that_do_not_fit_the_model_are_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(inputs, inputs, inputs)

    trainer, x = AdaptiveSparsityTrainer(Model(), annealing_steps=9), torch.randn(3, 64, 2, 8)
    for batch, words in (((x, torch.ones(3)), "2 entries"), ({"x": x}, r"\['x'\]")):
        with pytest.raises(TypeError, match=rf"Model.forward\(inputs.*holds {words}.*labels"):
            trainer.analyze_patterns([batch])
    assert trainer.analyze_patterns([(x,)])["sparsity_ratios"]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list"])
def test_analysis_of_a_bare_layer(kind: str) -> None:
    layer = make(budget="fixed", base_sparsity=0.5)
    x = torch.randn(3, 64, 2, 8)
    batch = {"tensor": x, "tuple": (x, x, x), "list": [x, x, x]}[kind]
    stats = AdaptiveSparsityTrainer(layer, annealing_steps=9).analyze_patterns(
        [batch] * 5, num_samples=4
    )
    assert len(stats["sparsity_ratios"]) == 6 * 2, "4 samples are 2 batches of 3"
    assert stats["sparsity_ratios"] == pytest.approx([0.5] * 12)
    assert len(stats["pattern_diversity"]) == 2
    assert len(stats["head_similarity"]) == 6
    assert all(0 <= value <= 1 for values in stats.values() for value in values)


def test_analysis_of_a_model_with_several_layers() -> None:
    model = Model()
    model.second.eval()
    modes = [module.training for module in model.modules()]
    x = torch.randn(4, 64, 2, 8)
    trainer = AdaptiveSparsityTrainer(model, annealing_steps=9)
    stats = trainer.analyze_patterns([(x, 2.0), {"x": x, "shift": 1.0}, x], num_samples=100)
    assert len(stats["sparsity_ratios"]) == 2 * 12 * 2
    assert len(stats["pattern_diversity"]) == 2 * 2
    assert len(stats["head_similarity"]) == 2 * 12
    assert [module.training for module in model.modules()] == modes
    assert not model.first.observed
    assert all(parameter.grad is None for parameter in model.parameters())
    again = trainer.analyze_patterns([(x, 2.0), {"x": x, "shift": 1.0}, x], num_samples=100)
    assert again == stats, "evaluation mode leaves no randomness"


def test_analysis_tells_content_from_repetition() -> None:
    layer = make(base_sparsity=0.7)
    ones, noise = torch.ones(4, 256, 2, 8), torch.randn(4, 256, 2, 8)
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=9)
    simple, varied = (trainer.analyze_patterns([x]) for x in (ones, noise))
    assert min(simple["sparsity_ratios"]) > max(varied["sparsity_ratios"]) + 0.2
    assert simple["pattern_diversity"] == [0.0, 0.0]
    assert min(varied["pattern_diversity"]) > 0.3


def test_modes_are_restored_after_an_error() -> None:
    layer = make()
    with pytest.raises(ValueError, match="head_dim"):
        AdaptiveSparsityTrainer(layer, annealing_steps=9).analyze_patterns(
            [torch.randn(1, 8, 2, 4)]
        )
    assert layer.training
    assert not layer.observed


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("initial_temperature", {"initial_temperature": 0.0}),
        ("initial_temperature", {"initial_temperature": float("nan")}),
        ("final_temperature", {"final_temperature": -1.0}),
        ("final_temperature", {"final_temperature": float("inf")}),
        ("annealing_steps", {"annealing_steps": 0}),
        ("schedule", {"schedule": "stairs"}),
        ("sparsity_warmup_steps", {"sparsity_warmup_steps": -1}),
        ("dense_steps", {"dense_steps": -1}),
        ("initial_sparsity", {"initial_sparsity": 1.0}),
    ],
)
def test_bad_arguments(name: str, options: dict) -> None:
    with pytest.raises(ValueError, match=name):
        AdaptiveSparsityTrainer(make(), **{"annealing_steps": 9, **options})


def test_bad_models_and_data() -> None:
    with pytest.raises(TypeError, match="model"):
        AdaptiveSparsityTrainer("layer", annealing_steps=9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model"):
        AdaptiveSparsityTrainer(nn.Linear(2, 2), annealing_steps=9)
    with pytest.raises(ValueError, match="num_samples"):
        AdaptiveSparsityTrainer(make(), annealing_steps=9).analyze_patterns([], num_samples=0)
    with pytest.raises(ValueError, match="dataloader"):
        AdaptiveSparsityTrainer(make(), annealing_steps=9).analyze_patterns([])


@pytest.mark.parametrize("name", ["annealing_steps", "sparsity_warmup_steps", "dense_steps"])
def test_steps_are_whole_numbers(name: str) -> None:
    for value in (math.inf, 1e400, math.nan, 2.5, True, "10"):
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            AdaptiveSparsityTrainer(**{"annealing_steps": 9, name: value})
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        AdaptiveSparsityTrainer(**{"annealing_steps": 9, name: -1})


def test_nobody_can_guess_the_length_of_a_training() -> None:
    with pytest.raises(TypeError, match=r"needs annealing_steps.* a quarter of the training"):
        AdaptiveSparsityTrainer(make())


def test_numbers_that_are_too_large_for_a_float() -> None:
    huge = 10**400
    trainer = AdaptiveSparsityTrainer(make(), annealing_steps=huge, sparsity_warmup_steps=huge)
    assert trainer.step() == 1.0
    trainer.load_state_dict(trainer.state_dict() | {"current_step": huge})
    assert trainer.temperature == 0.1
    assert trainer.sparsity(0.6) == 0.6


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_temperatures_as_far_apart_as_float32_allows(schedule: str) -> None:
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for ends in ((least, most), (most, least)):
        trainer = AdaptiveSparsityTrainer(make(), *ends, 4, schedule=schedule)
        seen = [ends[0], *(trainer.step() for _ in range(5))]
        assert seen == sorted(seen, reverse=ends[0] == most)
        assert seen[-1] == ends[1]
    for value in (0.0, -1.0, math.nan, math.inf, 1e39, 1e-39):
        with pytest.raises(ValueError, match="initial_temperature must be positive and finite"):
            AdaptiveSparsityTrainer(initial_temperature=value, annealing_steps=9)


def test_a_state_is_checked_before_any_of_it_is_taken() -> None:
    trainer = AdaptiveSparsityTrainer(make(), annealing_steps=5)
    before = trainer.state_dict()
    for change, error in (
        ({"annealing_steps": 0}, ValueError),
        ({"annealing_steps": 5.0}, TypeError),
        ({"current_step": -1}, ValueError),
        ({"final_temperature": math.nan}, ValueError),
        ({"initial_sparsity": 1.0}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(change))):
            trainer.load_state_dict(before | {"current_step": 3} | change)
        assert trainer.state_dict() == before


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.1), (0.1, 2.0), (0.5, 0.5)])
def test_starts_at_the_start_and_ends_at_the_end(name: str, start: float, end: float) -> None:
    move = SCHEDULES[name]
    assert move(start, end, 0.0) == pytest.approx(start)
    assert move(start, end, 1.0) == pytest.approx(end)
    values = [move(start, end, t / 50) for t in range(51)]
    assert values == sorted(values, reverse=end < start)


def test_shapes() -> None:
    assert SCHEDULES["linear"](1.0, 0.2, 0.25) == pytest.approx(0.8)
    assert SCHEDULES["cosine"](1.0, 0.0, 0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert SCHEDULES["exponential"](1.0, 0.01, 0.5) == pytest.approx(0.1)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_under_a_process_group_nothing_moves_what_no_loss_reaches(tmp_path):
    """Unused parameters get gradients of zeros there, and what has a gradient decays."""
    torch.manual_seed(0)
    layer = BlockSparseAdaptive(None, None, 2, 16, AdaptiveConfig(block_size=16))
    plain = BlockSparseAdaptive(None, None, 2, 16, layer.config)
    grouped = torch.optim.AdamW(parameter_groups(layer, weight_decay=0.1), lr=3e-3)
    optimizers = (grouped, torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.1))
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    store = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        for _ in range(20):
            x = torch.randn(1, 64, 2, 16)
            for one, optimizer in zip((layer, plain), optimizers, strict=True):
                one(x, x, x, is_causal=True).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.distributed.destroy_process_group()
    for name in ("budget_gain", "budget_offset"):
        assert torch.equal(layer.get_parameter(name), start[name])
        assert (plain.get_parameter(name) < start[name]).all(), "the test sees no decay"
    assert not torch.equal(layer.scorer.query_in, start["scorer.query_in"])


@pytest.mark.parametrize("scorer", ["bilinear", "mlp", "low_rank"])
@pytest.mark.parametrize("budget", ["adaptive", "fixed"])
def test_no_scalar_and_no_vector_of_a_layer_decays(scorer, budget):
    config = AdaptiveConfig(
        scorer=scorer, budget=budget, learnable_temperature=True,
        hierarchy=(2,) if scorer in ("bilinear", "mlp") else (),
    )  # fmt: skip
    model = nn.Sequential(nn.Linear(4, 4), BlockSparseAdaptive(None, None, 2, 16, config))
    decayed, kept = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0)
    assert {id(p) for p in kept["params"]} == {id(p) for p in model[1].parameters() if p.dim() < 2}
    together = [*decayed["params"], *kept["params"]]
    assert sorted(map(id, together)) == sorted(id(p) for p in model.parameters())


def test_groups_keep_their_options_and_their_own_decay():
    model = nn.ModuleList([ImportanceScorer(8, 2), nn.Linear(4, 4)])
    given = [
        {"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.2},
        {"params": model[1].parameters(), "factor": 3},
    ]
    maps, gain, rest = parameter_groups(model, weight_decay=0.1, groups=given)
    assert [len(g["params"]) for g in (maps, gain, rest)] == [2, 1, 2]
    assert gain["params"][0] is model[0].gain
    assert (maps["lr"], maps["weight_decay"]) == (0.5, 0.2)
    assert (gain["lr"], gain["weight_decay"]) == (0.5, 0)
    assert (rest["factor"], rest["weight_decay"]) == (3, 0.1)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(TypeError, match="model must be an"):
        parameter_groups([])
    for decay in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="weight_decay must be finite and not negative"):
            parameter_groups(nn.Linear(1, 1), weight_decay=decay)
