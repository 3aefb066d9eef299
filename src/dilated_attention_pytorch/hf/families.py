"""Which architectures can be adapted, where their attention layers are, and what is offloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.foreign_text import short_repr


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


# Model type of the text config: class of its attention layers.
FAMILIES = {
    "llama": "LlamaAttention",
    "qwen2": "Qwen2Attention",
    "qwen3": "Qwen3Attention",
    "mistral": "MistralAttention",
    "gemma3_text": "Gemma3Attention",
}


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """An attention layer of a model, and what a selector must know of it.

    Attributes:
        number: The layer's number in the model.
        module: The attention module.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Size of a head.
        scale: Factor of the logits.
        sliding: Whether a sliding window limits the layer; such layers are left alone.
    """

    number: int
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding: bool

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        projection: Any = self.module.q_proj
        owner = getattr(projection, "base_layer", projection)
        return execution_device(owner, self.query_weight)

    @property
    def query_weight(self) -> Tensor:
        """Weights of the query projection, without what LoRA adds; as stored if quantised."""
        return _weight(self.module.q_proj)

    @property
    def key_weight(self) -> Tensor:
        """Weights of the key projection, without what LoRA adds; as stored if quantised."""
        return _weight(self.module.k_proj)


def find_attention(model: nn.Module) -> list[AttentionSite]:
    """Lists the attention layers of a supported model, in order.

    Raises:
        TypeError: If ``model`` is no transformers model.
        ValueError: If its architecture is not supported (with the list of those that are), or it
            uses soft-capping, attention sinks or bidirectional attention.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise TypeError(
            f"model must be a transformers model, got {type(model).__name__}, which has no config."
        )
    kind = config.model_type
    shown = f"model of type {short_repr(kind)}"
    if kind not in FAMILIES:
        hint = ""
        if hasattr(config, "text_config"):
            hint = " Of a model for images and text, load the text model alone."
        raise ValueError(f"{shown} is not supported; supported are {sorted(FAMILIES)}.{hint}")
    _refuse_features(config)
    sites = [
        _site(module, config)
        for module in model.modules()
        if type(module).__name__ == FAMILIES[kind]
    ]
    if not sites:
        raise ValueError(
            f"{shown} holds no {FAMILIES[kind]}; remote code with attention of its own is not "
            "supported."
        )
    return sorted(sites, key=lambda site: site.number)


def _refuse_features(config: Any) -> None:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            "the model soft-caps its attention logits (attn_logit_softcapping="
            f"{config.attn_logit_softcapping}), which block-sparse attention does not compute."
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(
        config, "is_causal", True
    ):
        raise ValueError("the model attends in both directions; only causal models are supported.")


def _site(module: nn.Module, config: Any) -> AttentionSite:
    if getattr(module, "sinks", None) is not None:
        raise ValueError(
            "the model has learned attention sinks, which block-sparse attention does not compute."
        )
    number = int(getattr(module, "layer_idx"))  # noqa: B009
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        sliding = kinds[number] != "full_attention"
    else:
        sliding = getattr(config, "sliding_window", None) is not None
    return AttentionSite(
        number=number,
        module=module,
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads),
        head_dim=int(getattr(module, "head_dim")),  # noqa: B009
        scale=float(getattr(module, "scaling")),  # noqa: B009
        sliding=sliding,
    )


def _weight(projection: Any) -> Tensor:
    # peft keeps the original layer inside its own.
    layer = getattr(projection, "base_layer", projection)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    if callable(weight):
        # PyTorch's own quantised layers unpack theirs.
        unpacked: Tensor = weight().dequantize()
        return unpacked
    # Others name them as they like; the largest tensor is the weights.
    stored = [*layer.parameters(), *layer.buffers()]
    if not stored:
        raise ValueError(
            f"a projection of the model, {type(layer).__name__}, holds no weights as tensors; load "
            "the model in float32, float16 or bfloat16, without quantisation."
        )
    return max(stored, key=Tensor.numel)
