"""An adapter says where its base has other weights, wherever they are, or other changes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import tiny_model

pytest.importorskip("transformers", reason="needs the extra [hf]")

import contextlib

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import load_adapter, save_adapter
from dilated_attention_pytorch.hf.adapter_file import AdapterError, AdapterWarning, _digest
from dilated_attention_pytorch.hf.model_folder import add_lora, load_lora

CONFIG = AdaptiveConfig(block_size=16, base_sparsity=0.5, hidden_dim=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_model(), tmp_path / "adapter")


def saved(model: Any, folder: Path) -> Path:
    torch.manual_seed(3)
    with adapt(model, CONFIG) as adapted:
        return save_adapter(adapted, folder)


def moved(share: float, part: str = "") -> Any:
    """The model with noise on weights, by share of their size."""
    model, noise = tiny_model(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            size = weight.square().mean().sqrt() * share
            if part in name:
                weight.add_(torch.randn(weight.shape, generator=noise) * size)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight",
    ],
)  # fmt: skip
def test_weights_beside_queries_and_keys_count(name: str, folder: Path) -> None:
    """With its own queries and keys, but another value or MLP, it would have passed unseen."""
    shown = name.removeprefix("model.").replace(".", r"\.")
    words = rf"another base model .*{shown} differs: its signature is -?[\d.]+ there and -?[\d.]+"
    with pytest.raises(AdapterError, match=words):
        load_adapter(moved(1.0, name), folder)


def test_weights_that_were_trained_a_little_are_told(folder: Path) -> None:
    words = r"signature of layers\.\d\..*weight is -?[\d.]+ there and -?[\d.]+ here"
    with pytest.warns(AdapterWarning, match=words):
        load_adapter(moved(0.01), folder).undo()
    # As another precision rounds them.
    load_adapter(moved(0.001), folder).undo()


def test_the_model_without_its_head_is_the_same_base(folder: Path) -> None:
    load_adapter(tiny_model().model, folder).undo()


def test_low_rank_changes_belong_to_the_base(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft")
    model = tiny_model()
    lora = add_lora(model, 2)
    # Nothing is changed yet.
    load_adapter(model, folder).undo()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.01)
    with pytest.warns(AdapterWarning, match=r"low-rank changes of layer 0 is 0 there and -?\d"):
        load_adapter(model, folder).undo()
    own = saved(model, tmp_path / "tuned")
    load_adapter(model, own).undo()
    with pytest.warns(AdapterWarning, match="low-rank changes of layer 0 .* and 0 here"):
        load_adapter(tiny_model(), own).undo()
    lora.save_pretrained(tmp_path / "lora")
    again = tiny_model()
    load_lora(again, tmp_path / "lora")
    load_adapter(again, own).undo()
    with torch.no_grad():
        for name, value in again.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.01)
    with pytest.warns(AdapterWarning, match="low-rank changes of layer 0"):
        load_adapter(again, own).undo()


def test_files_of_earlier_versions_are_read_with_a_word(folder: Path, tmp_path: Path) -> None:
    path = folder / "adapter.json"
    about = json.loads(path.read_text())
    del about["base"]["weights"]
    about |= {"version": 2, "digest": _digest(about)}
    path.write_text(json.dumps(about))
    with pytest.warns(AdapterWarning, match=r"before version 3, .* save the adapter anew"):
        adapted = load_adapter(moved(0.01), folder)
    # As the warning says.
    save_adapter(adapted, tmp_path / "anew")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(moved(0.01), tmp_path / "anew").undo()


@pytest.mark.parametrize("weights", [[], {"a": "b"}, {"\x1b[31m": 0.5}, {"a": float("1e400")}])
def test_forged_signatures_are_refused(weights: Any, folder: Path) -> None:
    path = folder / "adapter.json"
    about = json.loads(path.read_text())
    about["base"]["weights"] = weights
    with contextlib.suppress(ValueError):
        about["digest"] = _digest(about)
    path.write_text(json.dumps(about))
    with pytest.raises(AdapterError):
        load_adapter(tiny_model(), folder)


@pytest.mark.parametrize("field", ["name", "model_type"])
def test_no_error_grows_with_what_a_file_says_of_its_base(field: str, folder: Path) -> None:
    path = folder / "adapter.json"
    about = json.loads(path.read_text())
    about["base"][field] = "a" * 100_000
    about["base"]["hidden_size"] += 1
    about["digest"] = _digest(about)
    path.write_text(json.dumps(about))
    with pytest.raises(AdapterError, match="another base model") as caught:
        load_adapter(tiny_model(), folder)
    assert len(str(caught.value)) < 2000
