"""Costs of single layers, passes that start at one, and sparsities that differ between layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter, load_adapter, save_adapter
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.evaluate import Evaluation, EvaluationSettings
from dilated_attention_pytorch.hf.layer_shares import KeptPrefix, decoder_layers, measure_costs
from dilated_attention_pytorch.hf.observe import mean_loss, next_token_loss
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts
from dilated_attention_pytorch.train.monitor import TileCount
from tiny_models import tiny_model, tokens

BLOCK = 8
CONFIG = AdaptiveConfig(block_size=BLOCK, budget="fixed", base_sparsity=0.5)
BY_THRESHOLD = AdaptiveConfig(block_size=BLOCK, budget="threshold", base_sparsity=0.5)
COSTS = SparsityCosts(150, (0.3, 0.7), {0: (0.0, 0.1), 1: (0.5, 5.0)})


def loss(model: Any, windows: torch.Tensor) -> float:
    with torch.no_grad():
        return float(next_token_loss(model, windows))


def test_costs_are_those_of_one_sparse_layer_among_dense_ones() -> None:
    windows = tokens(1, 97)
    model = tiny_model()
    dense = loss(model, windows)
    with adapt(model, CONFIG) as adapted:
        weights = [s.state_dict() for s in adapted.selectors.values()]
        found = dict(measure_costs(adapted, windows, (0.4, 0.7)))
        after = [s.state_dict() for s in adapted.selectors.values()]
    for before, now in zip(weights, after, strict=True):
        for name, value in before.items():
            torch.testing.assert_close(now[name], value, rtol=0, atol=0)
    for layer in (0, 1):
        with adapt(model, CONFIG, layers=[layer]) as adapted:
            adapted.selectors[layer].load_state_dict(weights[layer])
            for number, sparsity in enumerate((0.4, 0.7)):
                adapted.set_base_sparsity(sparsity)
                cost = loss(model, windows) - dense
                assert found[layer][number] == pytest.approx(cost, abs=1e-5)
    assert max(abs(x) for costs in found.values() for x in costs) > 1e-3


def test_only_the_layers_asked_for_are_measured() -> None:
    with adapt(tiny_model(), CONFIG) as adapted:
        assert [n for n, _ in measure_costs(adapted, tokens(1, 97), (0.4,), layers=[1])] == [1]


def test_thresholds_meet_the_sparsity_of_each_layer() -> None:
    sample = tokens(1, 600)[0]
    model = tiny_model()
    with adapt(model, BY_THRESHOLD) as adapted:
        adapted.costs = (COSTS,)
        goals = adapted.layer_sparsities(0.6)
        assert goals[0] != goals[1]
        calibrate(adapted, sample, 0.6, lengths=(150,), windows=4)
        for layer, selector in adapted.selectors.items():
            with TileCount([selector]) as tiles, torch.no_grad():
                for start in (0, 150, 300, 450):
                    model(sample[None, start : start + 150])
            assert tiles.sparsity == pytest.approx(goals[layer], abs=0.01)


def test_lengths_far_from_the_measured_one_have_the_same_sparsity_in_every_layer() -> None:
    with adapt(tiny_model(), BY_THRESHOLD) as adapted:
        adapted.costs = (COSTS,)
        assert adapted.layer_sparsities(0.6, 160) == adapted.layer_sparsities(0.6)
        assert adapted.layer_sparsities(0.6, 300) == {0: 0.6, 1: 0.6}
        calibrate(adapted, tokens(1, 300)[0], 0.6, lengths=(150, 300), windows=1)
        tables = [s.thresholds.clone() for s in adapted.selectors.values()]
        adapted.costs = ()
        calibrate(adapted, tokens(1, 300)[0], 0.6, lengths=(150, 300), windows=1)
        even = [s.thresholds.clone() for s in adapted.selectors.values()]
        for shared, same in zip(tables, even, strict=True):
            assert shared[0, 1] != same[0, 1]


def test_costs_travel_with_the_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    with adapt(model, CONFIG) as adapted:
        adapted.costs = (COSTS,)
        save_adapter(adapted, tmp_path / "a")
    with load_adapter(model, tmp_path / "a") as adapted:
        assert adapted.costs == (COSTS,)
        adapted.set_base_sparsity(0.6)
        found = {n: float(s.base_sparsity) for n, s in adapted.selectors.items()}
        assert found == pytest.approx(COSTS.allot(0.6))
    assert SelectorAdapter.read(tmp_path / "a").with_costs(()).costs == ()


def test_adapters_without_costs_and_of_version_1_are_read(tmp_path: Path) -> None:
    model = tiny_model()
    with adapt(model, CONFIG) as adapted:
        save_adapter(adapted, tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"
    about = json.loads(path.read_text())
    assert about["version"] == 3
    assert "costs" not in about
    path.write_text(json.dumps({**about, "version": 1}))
    with load_adapter(model, tmp_path / "a") as adapted:
        assert adapted.costs == ()
        assert adapted.layer_sparsities(0.6) == {0: 0.6, 1: 0.6}


def test_costs_of_other_layers_are_refused() -> None:
    with adapt(tiny_model(), CONFIG, layers=[1]) as adapted:
        adapted.costs = (COSTS,)
        with pytest.raises(ValueError, match=r"adapted layers \[1\], got \[0, 1\]"):
            adapted.set_base_sparsity(0.5)


def test_baselines_can_be_given_the_adapters_shares() -> None:
    model, text = tiny_model(), tokens(1, 900)[0]
    settings = EvaluationSettings(
        lengths=(128,), sparsities=(0.6,), baselines=("oracle:threshold",), block_size=BLOCK,
        windows=2, kept_mass=False, repeats=0,
    )  # fmt: skip
    with adapt(model, BY_THRESHOLD) as adapted:
        adapted.costs = (COSTS,)
        adapter = SelectorAdapter.of(adapted)
    evaluation = Evaluation(model, {"a": text}, settings, adapter)
    rows = {
        name: evaluation.measure("a", 128, name, 0.6)
        for name in ("oracle:threshold", "oracle:allotted", "adapter", "adapter:threshold")
    }
    for row in rows.values():
        assert row["measured_sparsity"] == pytest.approx(0.6, abs=0.03)
    assert rows["oracle:allotted"]["ratio"] != rows["oracle:threshold"]["ratio"]
    assert rows["adapter"]["ratio"] != rows["adapter:threshold"]["ratio"]
    plain = Evaluation(model, {"a": text}, settings, adapter.with_costs(()))
    again = plain.measure("a", 128, "adapter", 0.6)
    assert again["ratio"] == rows["adapter:threshold"]["ratio"]
    with pytest.raises(ValueError, match="need an adapter with costs"):
        plain.measure("a", 128, "oracle:allotted", 0.6)


ADAPTIVE = AdaptiveConfig(block_size=8, base_sparsity=0.5)
# Gemma's first layers slide and its second reads everything.
FOUR = {"num_hidden_layers": 4}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}


def deep_model(family: str) -> Any:
    return tiny_model(family, **FOUR, **(SLIDING if family == "gemma3" else {}))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_a_pass_from_a_layer_on_gives_the_loss_of_a_whole_one(family: str) -> None:
    windows = tokens(3, 65)
    with adapt(deep_model(family), ADAPTIVE) as adapted:
        prefix = KeptPrefix(adapted, windows)
        whole = prefix.loss()
        assert whole == mean_loss(adapted.model, windows)
        # Forwards, over a layer, and back.
        for number in (1, 3, 2, 0):
            prefix.move_to(number)
            assert prefix.loss() == whole


def test_the_layers_before_are_not_run_again() -> None:
    with adapt(deep_model("llama"), ADAPTIVE) as adapted:
        prefix = KeptPrefix(adapted, tokens(2, 65))
        prefix.move_to(2)
        ran: list[nn.Module] = []
        attention = [site.module for site in adapted.sites]
        hooks = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in attention]
        prefix.loss()
        assert ran == attention[2:] * 2
        ran.clear()
        prefix.move_to(3)
        assert ran == attention[2:3] * 2
        for hook in hooks:
            hook.remove()


def test_changes_before_the_layer_need_a_move_and_changes_behind_it_do_not() -> None:
    windows = tokens(1, 65)
    with adapt(deep_model("llama"), ADAPTIVE) as adapted:
        prefix = KeptPrefix(adapted, windows)
        prefix.move_to(2)
        before = prefix.loss()
        adapted.selectors[3].set_base_sparsity(0.9)
        behind = prefix.loss()
        assert behind == mean_loss(adapted.model, windows) != before
        adapted.selectors[1].set_base_sparsity(0.9)
        assert prefix.loss() == behind
        prefix.move_to(0)
        prefix.move_to(2)
        assert prefix.loss() == mean_loss(adapted.model, windows) != behind


def test_nothing_is_left_of_it() -> None:
    with adapt(deep_model("llama"), ADAPTIVE) as adapted:
        layers = decoder_layers(adapted)
        assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * 4
        own = layers[0].__dict__["forward"] = layers[0].forward
        states = [dict(layer.__dict__) for layer in layers]
        hooks = [dict(layer._forward_pre_hooks) for layer in layers]
        adapted.model.train()
        prefix = KeptPrefix(adapted, tokens(1, 65))
        prefix.move_to(3)
        prefix.loss()
        assert layers[0].__dict__["forward"] is own
        assert [layer._forward_pre_hooks for layer in layers] == hooks
        assert [set(layer.__dict__) for layer in layers] == [set(state) for state in states]
        assert adapted.model.training
        assert torch.is_grad_enabled()
