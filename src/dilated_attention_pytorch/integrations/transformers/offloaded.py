"""What an offloaded model keeps elsewhere: the values of its weights, and the device it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def execution_device(owner: nn.Module, weight: Tensor) -> torch.device:
    """Where a module computes with its weight, which may wait elsewhere in between.

    Args:
        owner: The module, such as a projection that accelerate offloads.
        weight: Of it.
    """
    if weight.is_meta:
        for hook in _hooks(owner):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return weight.device


def input_device(model: Any) -> torch.device:
    """Where a model of transformers takes its tokens, wherever its weights wait.

    Args:
        model: Its ``device`` is that of its first weight, which is ``meta`` between the calls of an
            offloaded model.
    """
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hooks = (hook for module in model.modules() for hook in _hooks(module))
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(x) for x in found if x is not None), device)


def real_values(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of parameters and buffers, from wherever accelerate has put them.

    Args:
        model: Holds them.
        tensors: The parameters and buffers themselves, under any names.

    Raises:
        ValueError: If one has no value: it is on the meta device and nobody has offloaded it.
    """
    if not any(tensor.is_meta for tensor in tensors.values()):
        return dict(tensors)
    places = {
        id(tensor): name
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }
    return {
        name: _offloaded(model, places[id(tensor)]) if tensor.is_meta else tensor
        for name, tensor in tensors.items()
    }


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """A value by its full name; the hook of any module around it may keep it."""
    module, path = model, name.split(".")
    for depth in range(len(path)):
        for hook in _hooks(module):
            kept = getattr(hook, "weights_map", None)
            if kept is None:
                continue
            try:
                value: Tensor = kept[".".join(path[depth:])]
            except KeyError:
                continue
            return value
        module = getattr(module, path[depth])
    raise ValueError(
        f"{name} must have a value, but is on the meta device; load the model's weights first."
    )


def _hooks(module: nn.Module) -> list[Any]:
    # accelerate's name; several of its hooks stand in one.
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", (hook,)))
