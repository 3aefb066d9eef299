"""Adapters of others: bounded, checked, never half applied, never asked of the Hub unasked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import save_tiny, tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.files import tensor_bytes
from dilated_attention_pytorch.hf import adapter, adapter_file
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter, load_adapter, save_adapter
from dilated_attention_pytorch.hf.adapter_file import AdapterError
from dilated_attention_pytorch.hf.model_folder import load_model, load_tokenizer
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive

CONFIG = AdaptiveConfig(block_size=16, base_sparsity=0.5, hidden_dim=4)
COMMITTED = Path(__file__).parents[2] / "experiments" / "results" / "pretrained"


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def folder(tmp_path: Path, model: Any) -> Path:
    with adapt(model, CONFIG) as adapted:
        return save_adapter(adapted, tmp_path / "adapter")


def state_of(model: Any) -> Any:
    """Everything that an adaptation may touch."""
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: value.clone() for name, value in model.state_dict().items()}.keys(),
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        model.config.to_dict(),
        model.config._attn_implementation,
    )


def forge(folder: Path, **changes: Any) -> None:
    """Changes adapter.json, with a digest that fits."""
    path = folder / "adapter.json"
    about = {**json.loads(path.read_text()), **changes}
    about["digest"] = adapter_file._digest(about)
    path.write_text(json.dumps(about))


@pytest.mark.parametrize("name", ["adapter", "adapter-32"])
def test_adapters_without_digests_are_read(name: str) -> None:
    found = SelectorAdapter.read(COMMITTED / name)
    assert len(found.configs) == 30
    assert len(found.tensors) == 150
    # They were written before there were peaks, by scores of every fourth query.
    assert {(x.query_stride, x.peak_share) for x in found.configs.values()} == {(4, 0.0)}


@pytest.mark.parametrize("place", [0.2, 0.5, 0.999])
def test_a_flipped_bit_of_the_weights_is_seen(place: float, folder: Path, model: Any) -> None:
    path = folder / "selectors.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=r"selectors\.safetensors is not as it was written"):
        load_adapter(model, folder)


def test_files_of_two_adapters_are_told_apart(tmp_path: Path, folder: Path, model: Any) -> None:
    """As a machine that stops between the two renames leaves them."""
    torch.manual_seed(5)
    with adapt(model, CONFIG) as adapted:
        save_adapter(adapted, tmp_path / "other")
    os.replace(tmp_path / "other" / "selectors.safetensors", folder / "selectors.safetensors")
    with pytest.raises(AdapterError, match="of two adapters"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("layers", {"num_layers": 10**7}, "num_layers must be at most"),
        ("layers", {"hidden_dim": 10**9}, "hidden_dim must be at most"),
        ("layers", {"block_size": [16]}, "block_size must be an int"),
        ("layers", {"base_sparsity": "0.9"}, "base_sparsity must be a number"),
        ("layers", {"hidden_dim": 5}, "do not fit its settings"),
        ("layers", {"kind": "magic"}, "unknown kind"),
        ("base", {"signature": {"0": [0.1], "1": [0.1, 0.2]}}, "two finite numbers"),
        ("base", {"num_attention_heads": -4}, "positive size"),
        ("base", {"surprise": 1}, "base must hold"),
        ("versions", {"auto_map": "x.py"}, None),
    ],
)
def test_forged_settings_are_refused(
    name: str, changes: dict[str, Any], words: str | None, folder: Path, model: Any
) -> None:
    about = json.loads((folder / "adapter.json").read_text())[name]
    target = about["0"] if name == "layers" else about
    target.update(changes)
    forge(folder, **{name: about})
    before = state_of(model)
    if words is None:
        load_adapter(model, folder).undo()
    else:
        with pytest.raises(AdapterError, match=words):
            load_adapter(model, folder)
    assert state_of(model) == before


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_code_is_refused(key: str, folder: Path, model: Any) -> None:
    forge(folder, **{key: {"AutoModel": "evil.py"}})
    with pytest.raises(AdapterError, match=f"{key}.*names no code to run"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nest at most"),
        ('{"format": "dilated_attention_pytorch.adapter", "version": 3, "version": 3}', "twice"),
        ('{"format": NaN}', "NaN is no number"),
        ('{"format": ' + "9" * 100_000 + "}", "more than 64 bits"),
        ('{"format": 1e999}', "too large"),
        ("\ufeff{}", "BOM"),
        ("[]", "must hold a JSON object"),
        ('{"format": "\\ud800"}', "is no text"),
    ],
)
def test_odd_json_is_refused(content: str, words: str, folder: Path) -> None:
    (folder / "adapter.json").write_text(content)
    with pytest.raises(AdapterError, match=words) as caught:
        SelectorAdapter.read(folder)
    assert "adapter.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["nan", "inf", "int8", "int64", "extra", "shape", "thresholds"])
def test_odd_weights_are_refused_and_the_model_left_alone(
    kind: str, folder: Path, model: Any
) -> None:
    found = SelectorAdapter.read(folder)
    name = next(name for name, value in found.tensors.items() if value.dim() > 1)
    value = found.tensors[name]
    if kind in ("nan", "inf"):
        value.view(-1)[3] = float(kind)
    elif kind in ("int8", "int64"):
        found.tensors[name] = value.to(getattr(torch, kind))
    elif kind == "shape":
        found.tensors[name] = value[:-1]
    elif kind == "extra":
        found.tensors["7.other"] = value
    else:
        found.tensors["0.thresholds"] = torch.tensor([[64.0, 0.1], [32.0, 0.1]])
    before = state_of(model)
    with pytest.raises(AdapterError):
        found.apply(model)
    # Nor are they written.
    content = (folder / "adapter.json").read_bytes()
    if kind != "shape":
        with pytest.raises(AdapterError):
            found.save_pretrained(folder)
    assert (folder / "adapter.json").read_bytes() == content
    assert state_of(model) == before
    weights = tensor_bytes(found.tensors, {"format": "dilated_attention_pytorch.adapter"})
    (folder / "selectors.safetensors").write_bytes(weights)
    with pytest.raises(AdapterError):
        load_adapter(model, folder)
    assert state_of(model) == before


def test_an_error_half_way_leaves_the_model_as_it_was(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(model)
    logits = model(tokens()).logits
    calls = []

    def fail(self: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError("no memory for the second layer")

    with monkeypatch.context() as patch:
        patch.setattr(BlockSparseAdaptive, "load_state_dict", fail)
        with pytest.raises(MemoryError):
            load_adapter(model, folder)
    assert len(calls) == 2
    assert state_of(model) == before

    def refuse(name: str) -> None:
        raise ValueError("not known here")

    with monkeypatch.context() as patch:
        patch.setattr(model, "set_attn_implementation", refuse)
        # Taking the selectors out needs it, too, and comes last.
        with pytest.raises(ValueError, match="not known here"):
            adapt(model, CONFIG)
    assert state_of(model) == before
    assert torch.equal(model(tokens()).logits, logits)
    load_adapter(model, folder).undo()


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_failing_disk_leaves_the_old_adapter(
    failing: int, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    torch.manual_seed(3)
    count = [0]

    def guard(call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == failing:
                raise OSError(28, "No space left on device")
            return call(*args, **kwargs)

        return counted

    with adapt(model, CONFIG) as adapted, monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, guard(getattr(os, name)))
        # Two files, each flushed, renamed and its folder flushed.
        with pytest.raises(OSError, match="No space"):
            save_adapter(adapted, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_failing_disk_leaves_no_new_folder(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with adapt(model, CONFIG) as adapted:
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            save_adapter(adapted, tmp_path / "new" / "adapter")
    assert not (tmp_path / "new").exists()


def test_saving_beside_a_model_leaves_its_settings(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with adapt(model, CONFIG) as adapted:
        save_adapter(adapted, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    load_adapter(model, tmp_path).undo()


def test_a_path_that_is_missing_asks_nobody(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ask(name: str, **options: Any) -> str:
        asked.append((name, options["token"]))
        raise OSError("offline")

    monkeypatch.setattr(adapter, "snapshot_download", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for missing in ("runs/adapter", "somebody/adapter", str(tmp_path / "a"), "./a/b", "a", ""):
        with pytest.raises(AdapterError):
            load_adapter(model, missing)
    for missing in (
        Path("somebody/adapter"),
        "runs/adapter",
        "./x/y",
        "../x/y",
        "~/x",
        "/x/y",
        "a",
    ):
        with pytest.raises(AdapterError):
            SelectorAdapter.from_pretrained(missing)
    for name in ("nobody/model", "nobody/model.here"):
        with pytest.raises(ValueError, match="there is no folder"):
            load_model(name)
        with pytest.raises(ValueError, match="there is no folder"):
            load_tokenizer(name)
    assert not asked
    # The one explicit way, without the token of this machine unless it is asked for.
    for token, sent in ((None, False), (False, False), (True, True), ("hf_x", "hf_x")):
        with pytest.raises(OSError, match="offline"):
            SelectorAdapter.from_pretrained("somebody/adapter", token=token)
        assert asked.pop() == ("somebody/adapter", sent)


def test_a_model_without_some_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path)
    load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights.*layers\.1\.mlp\.up_proj"):
        load_model(tmp_path)
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="cannot load a model from"):
        load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**7}))
    with pytest.raises(ValueError, match="num_hidden_layers must lie in"):
        load_model(tmp_path)
