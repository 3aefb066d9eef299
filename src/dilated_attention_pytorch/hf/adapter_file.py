"""The two files of an adapter: checked before anything is made of them, written as one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.files import (
    MAX_FILE,
    parse_tensors,
    read_file,
    replace_files,
    tensor_bytes,
)
from dilated_attention_pytorch.foreign_text import MAX_BYTES, json_digest, parse_json, short_repr
from dilated_attention_pytorch.hf.adapt import SelectorConfig, make_selector
from dilated_attention_pytorch.hf.attention import SELECTOR, DenseBelow
from dilated_attention_pytorch.hf.sites import AttentionSite, real_values
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig
from dilated_attention_pytorch.nn.held_budget import FIRST_HEAD
from dilated_attention_pytorch.runtime import with_dimension
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts
from dilated_attention_pytorch.selection.threshold import ThresholdTable

_CONFIG_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip
# Rounding weights to bfloat16 moves a signature by some 0.002; another model's are as far as
# independent standard normal numbers.
_TOLERANCE = 0.05
# Above what rounding to bfloat16 moves one by.
_ROUNDING = 0.01
# Numbers of a tensor that its signature in ``weights`` is made of.
_SAMPLE = 4096
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# What names of parameters lose: where a model stands in another one, and what peft puts in between.
_PLACES = re.compile(r"^(?:base_model\.)?(?:model\.)*|(?<=\.)base_layer\.")
_CHANGES = "low-rank changes"
_NAME = re.compile(r"[A-Za-z0-9_. -]{1,200}")


def base_identity(model: Any, sites: list[AttentionSite]) -> dict[str, Any]:
    """What an adapter remembers of its base: sizes, name, and a signature of the weights.

    The signature of a query or key projection is its product with fixed random signs, divided by
    its norm: about a standard normal number, close for close weights. ``weights`` holds one for
    every parameter, of a sample of its numbers, and for low-rank changes.

    Returns:
        Values for JSON.
    """
    config = model.config
    identity: dict[str, Any] = {name: getattr(config, name, None) for name in _CONFIG_FIELDS}
    if type(identity["num_key_value_heads"]) is not int:
        # Of older architectures, which call it otherwise or have as many as queries.
        identity["num_key_value_heads"] = sites[0].num_kv_heads
    identity["head_dim"] = sites[0].head_dim
    identity["name"] = getattr(config, "_name_or_path", "") or ""
    identity["signature"] = {
        str(site.number): [
            _signature(weight)
            for weight in real_values(
                model, {"query": site.query_weight, "key": site.key_weight}
            ).values()
        ]
        for site in sites
    }
    identity["weights"] = _weights(model)
    return identity


def size_difference(saved: dict[str, Any], config: Any) -> str | None:
    """Says how the sizes of a base differ from those of a model's settings, or returns None."""
    for name in _CONFIG_FIELDS:
        found = getattr(config, name, None)
        if found is None and name == "num_key_value_heads":
            continue
        if saved.get(name) != found:
            return f"{name} is {short_repr(saved.get(name))} there and {short_repr(found)} here"
    return None


def difference(saved: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Says how two bases differ, or returns None; names do not count."""
    for name in (*_CONFIG_FIELDS, "head_dim"):
        if saved.get(name) != found[name]:
            there, here = short_repr(saved.get(name)), short_repr(found[name])
            return f"{name} is {there} there and {here} here"
    for layer, numbers in found["signature"].items():
        other = saved.get("signature", {}).get(layer)
        if other is None:
            return f"attention layer {layer} is missing there"
        # Numbers that are none are near nothing.
        if any(not abs(a - b) <= _TOLERANCE for a, b in zip(numbers, other, strict=True)):
            return f"the weights of attention layer {layer} differ"
    for name, (a, b) in _pairs(saved, found).items():
        if not name.startswith(_CHANGES) and not abs(a - b) <= _TOLERANCE:
            return f"{name} differs: its signature is {a:g} there and {b:g} here"
    return None


def slight_difference(saved: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Says how two bases differ that are the same to :func:`difference`, or returns None.

    Weights that were trained a little, and low-rank changes that one of them lacks or that are
    others; not what another precision rounds. Also that nothing is known of most weights.
    """
    if "weights" not in saved:
        return "it was saved before version 3, which knows of queries and keys alone"
    pairs = _pairs(saved, found)
    # Low-rank changes first: all else may follow from them.
    for name in sorted(pairs, key=lambda name: (not name.startswith(_CHANGES), name)):
        a, b = pairs[name]
        if not abs(a - b) <= _ROUNDING:
            return f"the signature of {name} is {a:g} there and {b:g} here"
    return None


def _pairs(saved: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Signatures of both by name; low-rank changes that are none have 0."""
    if "weights" not in saved:
        # Earlier versions noted none.
        return {}
    there, here = saved["weights"], found["weights"]
    # A model may be without its head, or hold quantised weights, of which no signature is known.
    names = [
        name
        for name in sorted({*there, *here})
        if name.startswith(_CHANGES) or (name in there and name in here)
    ]
    return {name: (there.get(name, 0.0), here.get(name, 0.0)) for name in names}


def _weights(model: nn.Module) -> dict[str, float]:
    """Signatures of all parameters that are plain numbers, without the selectors' own.

    Low-rank changes are taken together by layer.
    """
    found: dict[str, float] = {}
    # One by one: an offloaded model need not fit into memory.
    for name, parameter in list(model.named_parameters()):
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
        # The first factor of a low-rank change alone changes nothing.
        if not plain or not parameter.numel() or f".{SELECTOR}." in name or "lora_A" in name:
            continue
        flat = real_values(model, {name: parameter})[name].detach().flatten()
        value = _signature(flat[:: flat.numel() // _SAMPLE | 1])
        if "lora_" in name:
            layer = _LAYER.search(name)
            place = f"{_CHANGES} of layer {layer[1]}" if layer else _CHANGES
            # A factor of zeros, as before the training, has 0.
            found[place] = round(found.get(place, 0.0) + value, 4)
        else:
            found[_PLACES.sub("", name)] = value
    return found


def _signature(weight: Tensor) -> float:
    generator = torch.Generator("cpu").manual_seed(weight.numel() % 2**31)
    signs = torch.randint(
        0, 2, (weight.numel(),), generator=generator, dtype=torch.int8, device="cpu"
    )
    flat = weight.detach().float().cpu().flatten()
    product = torch.where(signs.bool(), flat, -flat).double().sum()
    return round(float(product / flat.double().norm().clamp(min=1e-30)), 4)


def check_identity(saved: dict[str, Any]) -> None:
    """Raises ValueError unless these are values that :func:`base_identity` could have returned."""
    expected = {*_CONFIG_FIELDS, "head_dim", "name", "signature"}
    # Files of versions 1 and 2 hold no "weights".
    if set(saved) - {"weights"} != expected:
        raise ValueError(f"base must hold {sorted(expected)}, got {short_repr(sorted(saved))}.")
    for name in ("model_type", "name"):
        if not isinstance(saved[name], str):
            raise ValueError(f"{name} of the base must be a string, got {short_repr(saved[name])}.")
    for name in expected - {"model_type", "name", "signature"}:
        if type(saved[name]) is not int or not 1 <= saved[name] < 2**31:
            raise ValueError(
                f"{name} of the base must be a positive size, got {short_repr(saved[name])}."
            )
    signature = saved["signature"]
    if not isinstance(signature, dict) or not all(map(_is_signature, signature.values())):
        raise ValueError(
            "signature of the base must hold two finite numbers for each layer, got "
            f"{short_repr(signature)}."
        )
    weights = saved.get("weights", {})
    if not isinstance(weights, dict) or not all(
        _NAME.fullmatch(name) and _is_finite(value) for name, value in weights.items()
    ):
        raise ValueError(
            f"weights of the base must be finite numbers by name, got {short_repr(weights)}."
        )


def _is_signature(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_finite, value))


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


FORMAT = "dilated_attention_pytorch.adapter"
# Version 2 may hold costs of the layers, version 3 holds signatures of all weights of the base.
# Earlier files have no digest.
VERSION, READABLE = 3, (1, 2, 3)
CONFIG_NAME = "adapter.json"
WEIGHTS_NAME = "selectors.safetensors"

_REQUIRED = {"format", "version", "versions", "base", "layers"}
_OPTIONAL = {"costs", "weights", "digest", "dense_below"}
_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")
_TENSOR = re.compile(r"(0|[1-9][0-9]{0,3})\.([A-Za-z0-9_.]{1,200})")
_LARGEST_LENGTH = 2**40


class AdapterError(ValueError):
    """An adapter is missing, damaged or of another base; the message says what to do."""


class AdapterWarning(UserWarning):
    """The base is near the one that an adapter was made for, but not the same."""


# Not frozen: the Hub's mixin, which an heir has too, sets an attribute of its own at first.
@dataclass(eq=False)
class AdapterContent:
    """What an adapter's files hold; the fields are described in :class:`SelectorAdapter`."""

    configs: dict[int, SelectorConfig]
    tensors: dict[str, Tensor]
    base: dict[str, Any]
    versions: dict[str, str]
    costs: tuple[SparsityCosts, ...] = ()
    dense_below: dict[str, DenseBelow] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError if the parts do not belong together, or a number is none."""
        if not self.configs:
            raise ValueError("layers must hold at least one layer, got none.")
        check_identity(self.base)
        last = self.base["num_hidden_layers"] - 1
        if any(not 0 <= number <= last for number in self.configs):
            raise ValueError(
                f"layers must lie in 0 to {last}, got {short_repr(sorted(self.configs))}."
            )
        for name, value in self.tensors.items():
            _check_tensor(name, value, self.configs)
        for costs in self.costs:
            if set(costs.costs) != set(self.configs):
                raise ValueError(
                    f"costs must be those of the layers {short_repr(sorted(self.configs))}, got "
                    f"{short_repr(sorted(costs.costs))}."
                )

    def layer(self, number: int) -> dict[str, Tensor]:
        """State of the selector of a layer."""
        own = f"{number}."
        return {
            name.removeprefix(own): value
            for name, value in self.tensors.items()
            if name.startswith(own)
        }


def write_adapter(folder: Path, content: AdapterContent) -> None:
    """Writes both files; after an error the folder is as it was.

    Raises:
        OSError: If they cannot be written.
    """
    weights = tensor_bytes(content.tensors, {"format": FORMAT})
    _, metadata = parse_tensors(weights, WEIGHTS_NAME)
    about: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "versions": content.versions,
        "base": content.base,
        "layers": {str(number): _plain(config) for number, config in content.configs.items()},
        # Two files cannot be put in place at once: by this they know each other.
        "weights": metadata["digest"],
    }
    if content.costs:
        about["costs"] = [costs.to_dict() for costs in content.costs]
    if content.dense_below:
        about["dense_below"] = {name: asdict(one) for name, one in content.dense_below.items()}
    about["digest"] = _digest(about)
    text = json.dumps(about, indent=2, allow_nan=False) + "\n"
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_files({folder / WEIGHTS_NAME: weights, folder / CONFIG_NAME: text.encode()})
    except BaseException:
        for path in new:
            if path.is_dir():
                path.rmdir()
        raise


def read_adapter(folder: Path) -> AdapterContent:
    """Reads both files.

    Raises:
        AdapterError: If it holds no adapter, or a damaged one.
    """
    contents = {}
    for name, limit in ((CONFIG_NAME, MAX_BYTES), (WEIGHTS_NAME, MAX_FILE)):
        try:
            contents[name] = read_file(folder / name, limit=limit)
        except FileNotFoundError:
            raise AdapterError(
                f"{folder} is no adapter: it has no {name}. Name a folder that save_adapter "
                "or `dilated-attention distill` wrote."
            ) from None
        except ValueError as error:
            raise AdapterError(f"{folder} is no adapter: {error}") from error
    try:
        return _parse(folder, contents[CONFIG_NAME], contents[WEIGHTS_NAME])
    except AdapterError:
        raise
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"the adapter in {folder} is damaged: {error} Copy it again, or make it anew."
        ) from error


def check_fit(content: AdapterContent, sites: list[AttentionSite]) -> None:
    """Raises AdapterError unless the weights are those of such selectors; nothing is allocated."""
    for site in sites:
        if site.number not in content.configs:
            continue
        with torch.device("meta"):
            expected = make_selector(site, content.configs[site.number]).state_dict()
        for name, value in content.layer(site.number).items():
            wanted = expected.get(name)
            shapes = (value.shape, with_dimension(value).shape)
            fits = wanted is not None and wanted.shape in shapes
            if name == "budget_state" and wanted is not None:
                # Or of before it knew heads.
                fits |= value.shape == (len(wanted), FIRST_HEAD)
            if name == "thresholds":
                # There may be any number of lengths.
                fits = wanted is not None
            if not fits:
                shape = "none" if wanted is None else tuple(wanted.shape)
                raise AdapterError(
                    f"the adapter's weights do not fit its settings: layer {site.number} needs "
                    f"{short_repr(name)} of shape {shape}, got {tuple(value.shape)}."
                )


def _parse(folder: Path, config: bytes, weights: bytes) -> AdapterContent:
    place = str(folder / CONFIG_NAME)
    about = parse_json(config, place)
    if not isinstance(about, dict):
        raise ValueError(f"{place} must hold a JSON object, got {short_repr(about)}.")
    version = about.get("version")
    if about.get("format") != FORMAT or type(version) is not int or version not in READABLE:
        raise AdapterError(
            f"{folder} must hold an adapter of version {VERSION} or earlier, got "
            f"format={short_repr(about.get('format'))} version={short_repr(version)}."
        )
    _refuse_code(about, place)
    sealed = not {"weights", "digest"}.isdisjoint(about)
    missing = (_REQUIRED | {"weights", "digest"} if sealed else _REQUIRED) - set(about)
    unknown = set(about) - _REQUIRED - _OPTIONAL
    if missing or unknown:
        raise ValueError(
            f"{place} lacks {sorted(missing)} and holds the unknown {short_repr(sorted(unknown))}."
        )
    if sealed and about["digest"] != _digest(about):
        raise ValueError(f"{place} is not as it was written: content and digest do not fit.")
    tensors, metadata = parse_tensors(weights, str(folder / WEIGHTS_NAME), required=sealed)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{folder / WEIGHTS_NAME} must be of the format {FORMAT}, got "
            f"{short_repr(metadata.get('format'))}."
        )
    if sealed and about["weights"] != metadata.get("digest"):
        raise ValueError(
            f"{CONFIG_NAME} and {WEIGHTS_NAME} are of two adapters, as a writer that was stopped "
            "leaves them."
        )
    layers, costs = _mapping(about, "layers"), about.get("costs", [])
    if not isinstance(costs, list):
        raise ValueError(f"costs must be a list, got {short_repr(costs)}.")
    content = AdapterContent(
        {_number(name): _config(name, own) for name, own in layers.items()},
        tensors,
        _mapping(about, "base"),
        {name: str(own) for name, own in _mapping(about, "versions").items()},
        tuple(SparsityCosts.from_dict(own) for own in costs),
        _dense_below(about.get("dense_below", {})),
    )
    content.check()
    return content


def _digest(about: dict[str, Any]) -> str:
    """SHA-256 of all that decides what the adapter computes.

    Where its base lies and where it is dense may be set by hand, and every version is read alike.
    """
    left_out = ("version", "digest", "dense_below")
    decisive = {key: own for key, own in about.items() if key not in left_out}
    if isinstance(about.get("base"), dict):
        decisive["base"] = {key: own for key, own in about["base"].items() if key != "name"}
    return json_digest(decisive)


def _dense_below(told: Any) -> dict[str, DenseBelow]:
    """By device."""
    names = set(asdict(DenseBelow()))
    if not isinstance(told, dict) or any(
        not isinstance(one, dict) or set(one) != names for one in told.values()
    ):
        raise ValueError(
            f"dense_below must hold {sorted(names)} for each device, got {short_repr(told)}."
        )
    return {name: DenseBelow(**one) for name, one in told.items()}


def _refuse_code(about: dict[str, Any], place: str) -> None:
    for name in ("auto_map", "trust_remote_code"):
        if name in about:
            raise AdapterError(
                f"{place} has {name!r}: an adapter names no code to run, and none is ever run. "
                "Take the adapter from where it was made."
            )


def _mapping(about: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(about[name], dict):
        raise ValueError(f"{name} must be a JSON object, got {short_repr(about[name])}.")
    return dict(about[name])


def _number(name: str) -> int:
    if not _NUMBER.fullmatch(name):
        raise ValueError(f"a layer must be named by its number, got {short_repr(name)}.")
    return int(name)


def _check_tensor(name: str, value: Tensor, configs: Mapping[int, SelectorConfig]) -> None:
    found = _TENSOR.fullmatch(name)
    if found is None or int(found[1]) not in configs:
        raise ValueError(f"{short_repr(name)} is the weight of no layer of the adapter.")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, got {value.dtype}.")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, but holds NaN or infinite numbers.")
    part = found[2]
    if part == "thresholds":
        _check_thresholds(name, value)
    if part in _RANGES:
        low, high = _RANGES[part]
        if value.dim() or not low <= float(value) <= high:
            shown = short_repr(value.flatten()[:8].tolist())
            raise ValueError(f"{name} must be one number in [{low:g}, {high:g}], got {shown}.")


_RANGES = {
    "base_sparsity": (0.0, math.nextafter(1.0, 0.0)),
    "temperature": (1e-30, 1e30),
}


def _check_thresholds(name: str, rows: Tensor) -> None:
    """Per row a length and its threshold, as :class:`ThresholdTable` has them."""
    if rows.dim() != 2 or rows.shape[1] != 2:
        raise ValueError(
            f"{name} must be rows of a length and a threshold, got {tuple(rows.shape)}."
        )
    try:
        table = ThresholdTable.from_buffer(rows)
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}") from error
    if table is not None and table.lengths[-1] > _LARGEST_LENGTH:
        raise ValueError(
            f"the lengths of {name} must be at most {_LARGEST_LENGTH}, got {table.lengths[-1]}."
        )


def _plain(config: SelectorConfig) -> dict[str, Any]:
    kind = "adaptive" if isinstance(config, AdaptiveConfig) else "training_free"
    return {"kind": kind, **config.to_dict()}


def _config(name: str, values: Any) -> SelectorConfig:
    if not isinstance(values, dict):
        raise ValueError(f"layer {name} must hold settings, got {short_repr(values)}.")
    settings = dict(values)
    kind = settings.pop("kind", None)
    if kind == "adaptive":
        return AdaptiveConfig.from_dict(settings)
    if kind == "training_free":
        return TrainingFreeConfig.from_dict(settings)
    raise ValueError(f"layer {name} has an unknown kind of selector {short_repr(kind)}.")
