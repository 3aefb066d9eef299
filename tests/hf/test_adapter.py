"""Adapters: round trips, bases, damage, and other budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")
pytest.importorskip("transformers", reason="the transformers package is not installed")

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter, load_adapter, save_adapter
from dilated_attention_pytorch.hf.adapter_file import AdapterError
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.observe import CountTiles
from dilated_attention_pytorch.hf.train_selectors import distilled_config
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig
from dilated_attention_pytorch.nn.block_sparse import Watch

CONFIGS: dict[int, Any] = {
    0: AdaptiveConfig(base_sparsity=0.6, block_size=16, pooling=("mean", "attention")),
    1: TrainingFreeConfig(method="mean_pool", base_sparsity=0.5, block_size=16),
}


def saved(folder: Path, model: Any) -> torch.Tensor:
    """Saves an adapter with random weights and returns the logits it gave."""
    torch.manual_seed(1)
    with adapt(model, CONFIGS) as adapted, torch.no_grad():
        adapted.set_base_sparsity(0.7)
        save_adapter(adapted, folder)
        return model(tokens()).logits


def test_round_trip_gives_the_same_logits(tmp_path: Path) -> None:
    model = tiny_model()
    logits = saved(tmp_path / "adapter", model)
    torch.manual_seed(2)
    with load_adapter(model, tmp_path / "adapter") as adapted, torch.no_grad():
        assert adapted.configs == CONFIGS
        # The training-free layer has no weights: its sparsity is the configured one.
        adapted.selectors[1].set_base_sparsity(0.7)
        assert torch.equal(model(tokens()).logits, logits)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter.json", "selectors.safetensors", "README.md"} <= files
    about = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert about["base"]["model_type"] == "llama"
    assert about["versions"]["torch"] == torch.__version__


def test_the_base_may_have_another_precision(tmp_path: Path) -> None:
    model = tiny_model()
    saved(tmp_path, model)
    for dtype in (torch.bfloat16, torch.float16):
        load_adapter(tiny_model().to(dtype), tmp_path).undo()


def test_a_wrong_base_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = tiny_model()
    saved(tmp_path, model)
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.normal_()
    with pytest.raises(AdapterError, match=r"another base model.*layer 1 differ"):
        load_adapter(other, tmp_path)
    with pytest.raises(AdapterError, match="num_hidden_layers is 2 there and 3 here"):
        load_adapter(tiny_model(num_hidden_layers=3), tmp_path)
    with pytest.raises(AdapterError, match="model_type is 'llama' there and 'qwen3' here"):
        load_adapter(tiny_model("qwen3"), tmp_path)
    assert other.config._attn_implementation == "sdpa"


def test_damage_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(AdapterError, match=r"no adapter: it has no adapter\.json"):
        load_adapter(model, tmp_path)
    saved(tmp_path, model)
    about = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps({**about, "version": 9}))
    with pytest.raises(AdapterError, match="version=9"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter.json").write_text("{")
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(model, tmp_path)
    layers = {"0": {**about["layers"]["0"], "hidden_dim": 7}}
    (tmp_path / "adapter.json").write_text(json.dumps({**about, "layers": layers}))
    with pytest.raises(AdapterError, match="do not fit"):
        load_adapter(model, tmp_path)
    assert model.config._attn_implementation == "sdpa"


def test_scalars_without_a_dimension_load(tmp_path: Path) -> None:
    """As adapters held them before."""
    model = tiny_model()
    logits = saved(tmp_path, model)
    adapter = SelectorAdapter.read(tmp_path)
    for name in ("0.scorer.gain", "0.log_temperature"):
        adapter.tensors[name] = adapter.tensors[name].squeeze(0)
    with adapter.apply(model) as adapted, torch.no_grad():
        adapted.selectors[1].set_base_sparsity(0.7)
        assert torch.equal(model(tokens()).logits, logits)


def test_the_ordinary_mixin_saves_and_loads(tmp_path: Path) -> None:
    model = tiny_model()
    logits = saved(tmp_path / "a", model)
    adapter = SelectorAdapter.from_pretrained(tmp_path / "a")
    adapter.save_pretrained(tmp_path / "b")
    assert callable(adapter.push_to_hub)
    with load_adapter(model, tmp_path / "b") as adapted, torch.no_grad():
        adapted.selectors[1].set_base_sparsity(0.7)
        assert torch.equal(model(tokens()).logits, logits)


def test_selectors_without_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    config = TrainingFreeConfig(method="mean_pool", block_size=16, base_sparsity=0.5)
    with adapt(model, config) as adapted, torch.no_grad():
        logits = model(tokens()).logits
        save_adapter(adapted, tmp_path)
    assert SelectorAdapter.read(tmp_path).configs == {0: config, 1: config}
    # Everything is in adapter.json; the mixin's own settings file would only confuse.
    assert not (tmp_path / "config.json").exists()
    with load_adapter(model, tmp_path), torch.no_grad():
        assert torch.equal(model(tokens()).logits, logits)


@pytest.mark.parametrize("budget", ["adaptive", "threshold"])
def test_adapters_from_before_heads_were_measured_load(budget: str, tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(1, 128)
    config = AdaptiveConfig(block_size=8, base_sparsity=0.6, budget=budget)
    with adapt(model, config) as adapted, torch.no_grad():
        if budget == "threshold":
            calibrate(adapted, ids[0], 0.6, lengths=(128,), windows=1)
        logits = model(ids).logits
        save_adapter(adapted, tmp_path)
    new = SelectorAdapter.read(tmp_path)
    old = {n: x[:, :5].clone() if n.endswith("budget_state") else x for n, x in new.tensors.items()}
    assert any(old[name].shape != x.shape for name, x in new.tensors.items())
    SelectorAdapter(new.configs, old, new.base, new.versions).save_pretrained(tmp_path / "old")
    with load_adapter(model, tmp_path / "old"), torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_peaks_are_saved(tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(1, 128)
    config = distilled_config(block_size=8, base_sparsity=0.6, hidden_dim=4, query_stride=4)
    assert config.peak_share == 0.25
    with adapt(model, config) as adapted, torch.no_grad():
        calibrate(adapted, ids[0], 0.6, lengths=(128,), windows=1)
        logits = model(ids).logits
        save_adapter(adapted, tmp_path)
    with load_adapter(model, tmp_path) as adapted, torch.no_grad():
        assert adapted.configs[0] == config
        assert torch.equal(model(ids).logits, logits)


def test_the_same_scores_give_every_row_the_same_share():
    model = tiny_model("llama")
    tokens = torch.randint(0, model.config.vocab_size, (256,))
    with adapt(model, distilled_config(block_size=16, base_sparsity=0.5)) as adapted:
        calibrate(adapted, tokens, 0.5, lengths=(128, 256), windows=1)
        adapter = SelectorAdapter.of(adapted)
    with adapter.with_budget("fixed").apply(model) as adapted:
        assert {(x.budget, x.peak_share) for x in adapted.configs.values()} == {("fixed", 0.0)}
        with CountTiles(adapted) as tiles:
            model(tokens[None])
    assert tiles.sparsity == pytest.approx(0.5, abs=0.02)
    assert {config.budget for config in adapter.configs.values()} == {"threshold"}


def test_a_floor_evens_the_rows_out_at_the_same_sparsity():
    model = tiny_model("llama")
    tokens = torch.randint(0, model.config.vocab_size, (1024,))
    # Peaks keep a part of the even budget in every row, too.
    config = distilled_config(block_size=16, base_sparsity=0.6, peak_share=0.0)
    with adapt(model, config) as adapted:
        adapter = SelectorAdapter.of(adapted)
    fewest = {}
    for floor in (0.0, 0.9):
        with adapter.with_budget("threshold", floor).apply(model) as adapted:
            calibrate(adapted, tokens, 0.6, lengths=(256,), windows=4)
            counts = []
            for selector in adapted.selectors.values():
                selector.watch(
                    Watch(lambda x, kept=counts: kept.append(x.pattern.kv_num_blocks[..., -4:]))
                )
            with CountTiles(adapted) as tiles, torch.no_grad():
                for window in tokens.split(256):
                    model(window[None])
        assert tiles.sparsity == pytest.approx(0.6, abs=0.01)
        fewest[floor] = int(torch.cat(counts).min())
    assert fewest[0.0] < fewest[0.9]
