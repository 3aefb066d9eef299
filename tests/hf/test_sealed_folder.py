"""Low-rank changes and tuned models: damage is seen, and an error leaves the model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import save_tiny, tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")
pytest.importorskip("peft", reason="needs the extra [hf]")

from safetensors.torch import load_file, save_file

from dilated_attention_pytorch.hf.model_folder import add_lora, load_lora, load_model, seal_folder

NAME = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    handle = add_lora(tiny_model(), 4)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    handle.save_pretrained(tmp_path / "lora")
    seal_folder(tmp_path / "lora")
    return tmp_path / "lora"


def form(model: Any) -> Any:
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        sorted(vars(model)),
    )


def test_changes_are_loaded(folder: Path) -> None:
    model = tiny_model()
    before = model(tokens()).logits
    load_lora(model, folder)
    assert not torch.allclose(model(tokens()).logits, before)
    # Without digests, as earlier versions wrote them, too.
    (folder / "digests.json").unlink()
    load_lora(tiny_model(), folder)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bit", "not as it was written"), ("nan", "finite floating-point"),
        ("int8", "finite floating-point"), ("shape", "cannot load"), ("rank", "r is 100000000"),
        ("type", "must be of LORA"), ("code", "names code of its own"), ("gone", "no file"),
        ("empty", "no header"), ("none", "there is no folder"), ("brackets", "nest at most"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_and_the_model_left_alone(
    kind: str, words: str, folder: Path
) -> None:
    path, settings = folder / NAME, folder / "adapter_config.json"
    about, weights = json.loads(settings.read_text()), load_file(path)
    last = sorted(name for name in weights if "lora_B" in name)[-1]
    if kind == "bit":
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
    else:
        (folder / "digests.json").unlink()
    if kind in ("nan", "int8", "shape"):
        changed = {
            "nan": torch.full_like(weights[last], torch.nan),
            "int8": weights[last].to(torch.int8),
            "shape": weights[last][:-1].clone(),
        }
        save_file({**weights, last: changed[kind]}, path)
    changes = {
        "rank": {"r": 10**8}, "type": {"peft_type": "IA3"}, "code": {"auto_map": {"x": "y.Z"}},
    }  # fmt: skip
    settings.write_text(json.dumps({**about, **changes.get(kind, {})}))
    if kind == "bit":
        seal = json.loads((folder / "digests.json").read_text())
        assert set(seal["files"]) >= {NAME, "adapter_config.json"}
        settings.write_bytes(json.dumps(about, indent=2, sort_keys=True).encode())
    elif kind == "gone":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "brackets":
        settings.write_text("[" * 100_000)
    model = tiny_model()
    before, logits = form(model), model(tokens()).logits
    with pytest.raises(ValueError, match=words) as caught:
        load_lora(model, folder / "none" if kind == "none" else folder)
    assert str(folder) in str(caught.value)
    assert form(model) == before
    assert torch.equal(model(tokens()).logits, logits)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha must be"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "lora_alpha must be"),
        ({"rank_pattern": {"q_proj": 10**9}}, "r is 1000000000"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights must be"),
        ({"target_modules": ["q_proj"]}, "does not fit its settings"),
        ({"use_dora": True}, "does not fit its settings"),
        ({"modules_to_save": ["lm_head"]}, "cannot load"),
        ({"trainable_token_indices": [1]}, "cannot load"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_weights_are_refused(
    changes: dict[str, Any], words: str, folder: Path
) -> None:
    (folder / "digests.json").unlink()
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **changes}))
    model = tiny_model()
    before, logits = form(model), model(tokens()).logits
    with pytest.raises(ValueError, match=words):
        load_lora(model, folder)
    assert form(model) == before
    assert torch.equal(model(tokens()).logits, logits)


def test_a_tuned_model_is_checked_when_it_is_loaded(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    seal_folder(tmp_path)
    load_model(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(ValueError, match=r"config\.json is not as it was written"):
        load_model(tmp_path)
