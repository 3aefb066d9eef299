"""The model types of transformers: adapted and the same at sparsity 0, or refused with a reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")

import transformers
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import load_adapter, save_adapter
from dilated_attention_pytorch.hf.adapter_file import AdapterError
from dilated_attention_pytorch.hf.layer_shares import KeptPrefix
from dilated_attention_pytorch.hf.model_folder import add_lora
from dilated_attention_pytorch.hf.sites import find_attention
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from model_types import PAGE, build, model_types, prompt, verdict
from tiny_models import tiny_model, tokens

# A kernel of GPT-BigCode is still made so.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
# Of the rest the page tells; `python tests/model_types.py` checks all.
ADAPTED = [
    "cohere2", "gemma3n_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite",
    "jetmoe", "ministral", "mixtral", "nemotron", "olmo2", "olmo3", "phi3", "qwen2_moe",
    "qwen3_moe", "qwen3_next", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip
REFUSED = {
    "bloom": "no layer calls attention", "deepseek_v3": "values of another size",
    "deepseek_v32": "computes with its masks", "diffllama": "more than once",
    "gemma2": "soft-caps", "gpt_oss": "sinks", "inkling_text": "bias of positions",
    "mamba": "no layer calls attention", "minimax": "shorter than the keys",
    "minimax_m3_vl_text": "knows nothing of (block_indices)",
}  # fmt: skip


def page() -> dict[str, str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    return {row.split("`")[1]: row for row in rows}


of_this_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}:" not in PAGE.read_text(encoding="utf-8"),
    reason="the page is about another version of transformers",
)


@of_this_version
@pytest.mark.parametrize("kind", [*ADAPTED, *REFUSED])
def test_a_type_is_what_the_page_says(kind: str) -> None:
    found = verdict(kind)
    assert found.result == ("adapted" if kind in ADAPTED else "refused")
    assert REFUSED.get(kind, "") in found.detail
    assert found.row == page()[kind]


@of_this_version
def test_the_page_has_every_type() -> None:
    rows = page()
    assert sorted(rows) == sorted(model_types())
    results = Counter(row.split("|")[2].strip() for row in rows.values())
    assert set(results) == {"adapted", "refused", "not built"}
    assert results["adapted"] >= 80
    assert f"which {results['adapted']} are adapted" in PAGE.read_text(encoding="utf-8")


def test_what_a_selector_needs_is_what_the_layer_hands_over() -> None:
    (first, second) = find_attention(build("granite"))
    assert (first.number, second.number) == (0, 1)
    assert (first.num_heads, first.num_kv_heads, first.head_dim, first.scale) == (4, 2, 16, 1.0)
    (site,) = find_attention(build("jamba"))
    assert site.number == 1
    assert find_attention(build("gpt_bigcode"))[0].num_kv_heads == 1
    assert [bool(site.dense) for site in find_attention(build("olmo3"))] == [True, False]


def test_looking_leaves_nothing_behind() -> None:
    model = build("gpt2").train()
    names = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    state, before = torch.get_rng_state(), model.config._attn_implementation
    find_attention(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == before
    assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == names
    assert all(module.training for module in model.modules())


def test_attention_that_is_silently_another_is_refused() -> None:
    """Own attention that PyTorch's causal one does not give, with nothing said in the call."""

    class Twice(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            self.scaling = 0.5 if self.config._attn_implementation == "sdpa" else 0.25
            return super().forward(*args, **kwargs)

    model = tiny_model()
    model.model.layers[1].self_attn.__class__ = Twice
    with pytest.raises(ValueError, match=r"other outputs than its own attention \(relative dif"):
        adapt(model)


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gpt_neox"])
def test_adapters_of_models_with_one_map_for_queries_keys_and_values(
    kind: str, tmp_path: Path
) -> None:
    config = AdaptiveConfig(base_sparsity=0.6, block_size=8)
    model, ids = build(kind), tokens(length=40)
    torch.manual_seed(1)
    with adapt(model, config) as adapted, torch.no_grad():
        wanted = model(ids).logits
        save_adapter(adapted, tmp_path)
    with load_adapter(model, tmp_path), torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    with torch.no_grad():
        site = find_attention(model)[1]
        site.query_weight.copy_(site.query_weight.flip(0))
    with pytest.raises(AdapterError, match="weights of attention layer 1 differ"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("kind", ["jamba", "gemma3n_text", "gpt2", "mixtral", "phi3", "opt"])
def test_sparse_generation_from_a_cache_is_that_without(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: Counter[str] = Counter()
    for name in ("decode", "remember"):
        original = getattr(BlockSparseAdaptive, name)

        def spy(*args: Any, _n: str = name, _f: Any = original, **options: Any) -> Any:
            steps[_n] += 1
            return _f(*args, **options)

        monkeypatch.setattr(BlockSparseAdaptive, name, spy)
    config = AdaptiveConfig(base_sparsity=0.6, block_size=8, query_scope="past")
    model, (ids, mask) = build(kind), prompt()
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with adapt(model, config):
        wanted = model.generate(ids, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), wanted)
    assert steps["decode"] >= 11
    assert not steps["remember"]


# How a family writes its decoder layers decides whether those before another one can be left out.
@pytest.mark.parametrize("kind", ADAPTED)
def test_costs_of_layers_are_measured_as_by_whole_passes(kind: str) -> None:
    windows = tokens(2, 33)
    with adapt(build(kind), AdaptiveConfig(base_sparsity=0.5, block_size=8)) as adapted:
        prefix = KeptPrefix(adapted, windows)
        whole = prefix.loss()
        # Of two layers the second has attention in every type.
        prefix.move_to(1)
        assert prefix.loss() == pytest.approx(whole, rel=1e-6)


def test_low_rank_changes_need_projections_with_usual_names() -> None:
    pytest.importorskip("peft", reason="needs peft")
    add_lora(build("gpt_neox"), 2)
    with pytest.raises(ValueError, match=r"of which the model has none; take train='selectors'"):
        add_lora(build("gpt2"), 2)
