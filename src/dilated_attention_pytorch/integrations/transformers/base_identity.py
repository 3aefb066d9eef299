"""Tells one base model from another, whatever precision it is loaded in."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.foreign_text import short_repr
from dilated_attention_pytorch.integrations.transformers.attention import SELECTOR
from dilated_attention_pytorch.integrations.transformers.families import AttentionSite
from dilated_attention_pytorch.integrations.transformers.offloaded import real_values

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
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
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
    identity: dict[str, Any] = {name: getattr(config, name) for name in _CONFIG_FIELDS}
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
        if saved.get(name) != found:
            return f"{name} is {short_repr(saved.get(name))} there and {short_repr(found)} here"
    return None


def difference(saved: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Says how two bases differ, or returns None; names do not count."""
    for name in (*_CONFIG_FIELDS, "head_dim"):
        if saved.get(name) != found[name]:
            return f"{name} is {saved.get(name)!r} there and {found[name]!r} here"
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
