"""Tells one base model from another, whatever precision it is loaded in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.families import AttentionSite

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
        str(site.number): [_signature(site.query_weight), _signature(site.key_weight)]
        for site in sites
    }
    return identity


def difference(saved: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Says how two bases differ, or returns None; names do not count."""
    for name in (*_CONFIG_FIELDS, "head_dim"):
        if saved.get(name) != found[name]:
            return f"{name} is {saved.get(name)!r} there and {found[name]!r} here"
    for layer, numbers in found["signature"].items():
        other = saved.get("signature", {}).get(layer)
        if other is None:
            return f"attention layer {layer} is missing there"
        if any(abs(a - b) > _TOLERANCE for a, b in zip(numbers, other, strict=True)):
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
