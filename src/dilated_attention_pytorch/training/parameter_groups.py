"""Groups of parameters for an optimiser whose weight decay leaves gains alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer

# By name: sharding flattens parameters, so that all of them would look like vectors.
_KEPT = ("budget_gain", "budget_offset", "gain", "log_temperature")


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.01,
    groups: Iterable[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Splits parameters for an optimiser: gains, offsets and temperatures do not decay.

    Their neutral value is not 0: decay makes an adaptive budget smaller and flatter, and a
    temperature forget. It shows where nothing else moves them. Under ``torch.distributed`` every
    parameter of a layer gets a gradient, of zeros if need be, and what has a gradient decays: in
    200 steps of AdamW at a rate of 3e-3 and a decay of 0.1 a gain of 1 becomes 0.942.

    Args:
        model: Holds adaptive layers or scorers; any other model gives a group that decays.
        weight_decay: Of all other parameters, unless their group names its own; not negative.
        groups: As for an optimiser: dicts of ``"params"`` and options, which both parts of a group
            keep. None: one group of all parameters of ``model``.

    Returns:
        Per group the part that decays and the part that does not, without empty ones.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If a weight decay is negative or not finite.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import MultiheadAdaptiveAttention
        >>> layer = MultiheadAdaptiveAttention(embed_dim=64, num_heads=4)
        >>> optimizer = torch.optim.AdamW(parameter_groups(layer, weight_decay=0.1), lr=1e-3)
        >>> [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
        [(6, 0.1), (4, 0.0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    kept = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BlockSparseLayer | ImportanceScorer)
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] in _KEPT
    }
    found: list[dict[str, Any]] = []
    given_groups: Iterable[Mapping[str, Any]] = groups or [{"params": model.parameters()}]
    for group in given_groups:
        decay, given = group.get("weight_decay", weight_decay), list(group["params"])
        if not (math.isfinite(decay) and decay >= 0):
            raise ValueError(f"weight_decay must be finite and not negative, got {decay}.")
        parts = (
            ([p for p in given if id(p) not in kept], decay),
            ([p for p in given if id(p) in kept], 0.0),
        )
        found += [{**group, "params": own, "weight_decay": rate} for own, rate in parts if own]
    return found
