"""adapt and undo: what changes, what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")

import transformers

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import load_adapter, save_adapter
from dilated_attention_pytorch.hf.adapter_file import AdapterError
from dilated_attention_pytorch.hf.attention import SELECTOR, register
from dilated_attention_pytorch.hf.model_folder import load_model
from dilated_attention_pytorch.nn.baselines import BlockSparseTrainingFree, TrainingFreeConfig

SPARSE = AdaptiveConfig(base_sparsity=0.6, block_size=16)


def contents(model: Any) -> tuple[Any, ...]:
    """All that an adaptation might leave behind."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [name for name, _ in model.named_buffers()],
        [sorted(vars(module)) for module in model.modules()],
        model.config.to_dict(),
        model.config._attn_implementation,
        sorted(vars(model.config)),
        list(model.state_dict()),
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_undo_restores_outputs_bit_for_bit_and_every_module(
    family: str, implementation: str
) -> None:
    model = tiny_model(family, attn_implementation=implementation)
    model.model.embed_tokens.weight.requires_grad_(False)
    before, logits = contents(model), model(tokens()).logits
    adapted = adapt(model, SPARSE).freeze_base()
    sparse = model(tokens()).logits
    assert not torch.equal(sparse, logits)
    assert contents(model) != before
    assert adapted.undo() is model
    assert contents(model) == before
    assert torch.equal(model(tokens()).logits, logits)
    adapted.undo()
    assert contents(model) == before


def test_context_manager_undoes_after_an_error() -> None:
    model = tiny_model()
    before = contents(model)
    with pytest.raises(RuntimeError, match="on purpose"), adapt(model, SPARSE):
        raise RuntimeError("on purpose")
    assert contents(model) == before


def test_sliding_window_layers_are_left_alone() -> None:
    model = tiny_model("gemma3")
    with adapt(model, SPARSE) as adapted:
        assert list(adapted.selectors) == [1]
    with pytest.raises(ValueError, match=r"layers \[0\] have a sliding window"):
        adapt(model, SPARSE, layers=[0, 1])
    with pytest.raises(ValueError, match="no layer is left"):
        adapt(tiny_model("mistral", sliding_window=32), SPARSE)


def test_each_layer_can_have_settings_of_its_own() -> None:
    model = tiny_model()
    configs = {0: SPARSE, 1: TrainingFreeConfig(method="mean_pool", block_size=32)}
    with adapt(model, configs) as adapted:
        assert adapted.selectors[0].block_size == 16
        assert isinstance(adapted.selectors[1], BlockSparseTrainingFree)
        model(tokens())
    with pytest.raises(ValueError, match="layers excludes a mapping"):
        adapt(model, configs, layers=[0])
    with pytest.raises(ValueError, match=r"layers must lie in 0 to 1, got \[7\]"):
        adapt(model, SPARSE, layers=[7])


def test_selector_takes_scale_heads_mode_and_backend_from_the_model() -> None:
    model = tiny_model("gemma3").train()
    with adapt(model, SPARSE, backend="reference") as adapted:
        selector = adapted.selectors[1]
        assert (selector.num_heads, selector.num_kv_heads, selector.head_dim) == (4, 2, 16)
        assert selector.scale == pytest.approx(8**-0.5)
        assert selector.backend == "reference"
        assert selector.training
    with adapt(tiny_model().to(torch.bfloat16), SPARSE) as adapted:
        assert {p.dtype for p in adapted.selector_parameters()} == {torch.float32}


def test_set_base_sparsity_reaches_every_selector() -> None:
    model = tiny_model()
    with adapt(model, SPARSE) as adapted, torch.no_grad():
        first = model(tokens()).logits
        adapted.set_base_sparsity(0.0)
        dense = model(tokens()).logits
    assert not torch.allclose(first, dense)
    torch.testing.assert_close(dense, model(tokens()).logits, atol=2e-4, rtol=2e-4)


def test_unsupported_models_are_named_with_the_reason() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    with pytest.raises(ValueError, match=r"'mamba' is not supported: no layer .*MambaMixer"):
        adapt(model, SPARSE)
    with pytest.raises(TypeError, match="must be a transformers model"):
        adapt(torch.nn.Linear(1, 1), SPARSE)
    with torch.device("meta"):
        config = tiny_model().config
        model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="meta device; load them first"):
        adapt(model, SPARSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "soft-caps"),
        ({"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_what_the_op_does_not_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(tiny_model("gemma3", **changes), SPARSE)


def test_attention_sinks_are_refused() -> None:
    model = tiny_model()
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="attention sinks"):
        adapt(model, SPARSE)


def test_wrong_uses_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(TypeError, match="config must be an AdaptiveConfig"):
        adapt(model, {0: "sparse"})  # type: ignore[dict-item]
    with adapt(model, SPARSE):
        with pytest.raises(ValueError, match="adapted already"):
            adapt(model, SPARSE)
        with pytest.raises(ValueError, match="output_attentions must be False"):
            model.model.layers[0].self_attn(
                torch.zeros(1, 4, 32),
                position_embeddings=model.model.rotary_emb(torch.zeros(1), torch.arange(4)[None]),
                attention_mask=torch.empty(1, 1, 0, 4, dtype=torch.int32),
                output_attentions=True,
            )
        with pytest.raises(ValueError, match="no mask of single pairs"):
            model(tokens(), attention_mask=torch.zeros(2, 1, 90, 90))
    model = tiny_model(attention_dropout=0.1).train()
    with adapt(model, SPARSE), pytest.raises(ValueError, match="attention_dropout must be 0"):
        model(tokens())
    model = tiny_model()
    with adapt(model, SPARSE):
        model.model.layers[1].self_attn.scaling = 1.0
        with pytest.raises(ValueError, match=r"scaling must be 0\.25"):
            model(tokens())


def test_register_is_explicit_and_can_be_repeated() -> None:
    assert register() == register()
    model = tiny_model()
    logits = model(tokens()).logits
    model.set_attn_implementation(register())
    assert not hasattr(model.model.layers[0].self_attn, SELECTOR)
    torch.testing.assert_close(model(tokens()).logits, logits, atol=1e-5, rtol=1e-5)


class Packed(torch.nn.Module):
    """A projection with weights in a form of its own, as quantised models have."""

    def __init__(self, linear: torch.nn.Linear, name: str) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer(name, (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("factor", scale)
        self.stored = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (getattr(self, self.stored) * self.factor).mT


class Unpacking(Packed):
    """Likewise, with a method as PyTorch's dynamically quantised layers have."""

    def weight(self) -> torch.Tensor:
        return getattr(self, self.stored) * self.factor


class Hidden(torch.nn.Module):
    """A projection whose weights are no tensors of the module."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.kept = [linear]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kept[0](x)


@pytest.mark.parametrize(("kind", "name"), [
    (Packed, "weight"), (Packed, "qweight"), (Unpacking, "packed"),
])  # fmt: skip
def test_a_quantised_base(kind: type[Packed], name: str, tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        model = tiny_model()
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.add_(seed)
        with torch.no_grad():
            plain = model(tokens()).logits
        for layer in model.model.layers:
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer.self_attn, part, kind(getattr(layer.self_attn, part), name))
        return model, plain

    model, plain = make(0)
    with torch.no_grad():
        dense = model(tokens()).logits
    assert float((dense - plain).norm() / plain.norm()) < 0.2
    with adapt(model, AdaptiveConfig(base_sparsity=0.0, block_size=16)) as adapted:
        adapted.freeze_base()
        torch.testing.assert_close(model(tokens()).logits, dense, rtol=1e-4, atol=1e-4)
        save_adapter(adapted, tmp_path)
    with load_adapter(model, tmp_path):
        assert model(tokens()).logits.isfinite().all()
    with pytest.raises(AdapterError, match="another base model"):
        load_adapter(make(1)[0], tmp_path)


def test_a_base_without_weights_is_named() -> None:
    model = tiny_model()
    model.model.layers[0].self_attn.q_proj = Hidden(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match=r"Hidden, holds no weights.*without quantisation"):
        adapt(model, SPARSE)


def test_a_quantised_folder_names_the_package_that_it_needs(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "eetq"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"cannot load a model from .*EETQ"):
        load_model(tmp_path)
