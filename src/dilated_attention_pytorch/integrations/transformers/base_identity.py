"""Tells one base model from another, whatever precision it is loaded in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.families import AttentionSite
from dilated_attention_pytorch.integrations.transformers.offloaded import real_values
from dilated_attention_pytorch.strict_json import short_repr

_CONFIG_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip
# Rounding weights to bfloat16 moves a signature by some 0.002; another model's are as far as
# independent standard normal numbers.
_TOLERANCE = 0.05


def base_identity(model: Any, sites: list[AttentionSite]) -> dict[str, Any]:
    """What an adapter remembers of its base: sizes, name, and a signature of the weights.

    The signature of a query or key projection is its product with fixed random signs, divided by
    its norm: about a standard normal number, close for close weights.

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
    return None


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
    if set(saved) != expected:
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


def _is_signature(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(x) in (int, float) and math.isfinite(x) for x in value)
    )
