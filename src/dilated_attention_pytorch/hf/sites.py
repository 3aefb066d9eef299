"""Which attention layers can be made sparse, as a short pass shows, and what is offloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from dilated_attention_pytorch.analysis.recording import evaluation_mode
from dilated_attention_pytorch.foreign_text import short_repr
from dilated_attention_pytorch.hf.attention import SELECTOR
from dilated_attention_pytorch.hf.mask import compact_mask, is_compact, token_mask


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


# Model types that attention alone does not show to be unfit.
_UNFIT = {"minimax": "the masks that it makes with a cache are shorter than the keys."}


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
        dense: Why the layer is left alone, such as ``"have a sliding window"``; None: it can be
            made sparse.
    """

    number: int
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dense: str | None

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        projection = self._projections()[0]
        owner = getattr(projection, "base_layer", projection)
        return execution_device(owner, self.query_weight)

    @property
    def query_weight(self) -> Tensor:
        """Weights of the query projection, without what LoRA adds; as stored if quantised.

        Of a layer that makes queries, keys or values at once: its first map by name.
        """
        return _weight(self._projections()[0])

    @property
    def key_weight(self) -> Tensor:
        """Weights of the key projection, likewise; of other layers their last map by name."""
        return _weight(self._projections()[1])

    def _projections(self) -> tuple[nn.Module, nn.Module]:
        named = self.module._modules
        if "q_proj" in named and "k_proj" in named:
            maps = [named["q_proj"], named["k_proj"]]
        else:
            children = (named[name] for name in sorted(named) if name != SELECTOR)
            maps = [x for x in children if x is not None and _is_map(x)]
        if not maps:
            raise ValueError(
                f"an attention layer of the model, {type(self.module).__name__}, holds no "
                "projections with weights, by which an adapter knows its model."
            )
        return maps[0], maps[-1]  # type: ignore[return-value]


def find_attention(model: nn.Module) -> list[AttentionSite]:
    """Lists the attention layers of a model, in order, by what they hand to attention.

    The model runs twice on eight tokens: as it is, and with a function in the place of its
    attention that notes every call and computes what block-sparse attention computes at sparsity 0.
    Both must give the same. The model is then as it was; random numbers too. Offloaded weights are
    loaded for it as for any pass.

    Raises:
        TypeError: If ``model`` is no transformers model.
        ValueError: If its attention is none that block-sparse attention computes; the message says
            what it has.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise TypeError(
            f"model must be a transformers model, got {type(model).__name__}, which has no config."
        )
    shown = f"model of type {short_repr(config.model_type)}"
    try:
        _refuse_features(config)
        device = input_device(model)
        if device.type == "meta":
            raise ValueError("its weights are on the meta device; load them first.")
        adapted = any(SELECTOR in module._modules for module in model.modules())
        return _sites(attention_calls(model, device, compare=not adapted))
    except ValueError as error:
        raise ValueError(f"{shown} is not supported: {error}") from error


def _refuse_features(config: Any) -> None:
    if config.model_type in _UNFIT:
        raise ValueError(_UNFIT[config.model_type])
    if hasattr(config, "text_config"):
        raise ValueError("of a model for images, sounds and text, load the text model alone.")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("it has an encoder; only decoders are supported.")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            "it soft-caps its attention logits (attn_logit_softcapping="
            f"{config.attn_logit_softcapping}), which block-sparse attention does not compute."
        )
    both = getattr(config, "use_bidirectional_attention", False) in (True, "all")
    if both or not getattr(config, "is_causal", True):
        raise ValueError("it attends in both directions; only causal models are supported.")


def _sites(calls: list[AttentionCall]) -> list[AttentionSite]:
    number_of_calls = Counter(call.module for call in calls)
    repeated = sorted({type(m).__name__ for m, count in number_of_calls.items() if count > 1})
    if repeated:
        raise ValueError(f"a layer ({repeated[0]}) computes attention more than once in a pass.")
    sites = [_site(call, place) for place, call in enumerate(calls)]
    if len({site.number for site in sites}) != len(sites):
        raise ValueError("several of its attention layers have the same layer_idx.")
    return sorted(sites, key=lambda site: site.number)


def _site(call: AttentionCall, place: int) -> AttentionSite:
    if getattr(call.module, "sinks", None) is not None:
        raise ValueError(
            "it has learned attention sinks, which block-sparse attention does not compute."
        )
    dense = None
    if call.sliding:
        dense = "have a sliding window"
    elif call.value_dim != call.head_dim:
        dense = (
            f"have values of another size ({call.value_dim}) than queries and keys "
            f"({call.head_dim})"
        )
    number = getattr(call.module, "layer_idx", None)
    number = place if number is None else int(number)  # type: ignore[call-overload]
    if number < 0:
        raise ValueError(f"an attention layer must have a number, but its layer_idx is {number}.")
    return AttentionSite(
        number=number,
        module=call.module,
        num_heads=call.num_heads,
        num_kv_heads=call.num_kv_heads,
        head_dim=call.head_dim,
        scale=call.scale,
        dense=dense,
    )


def _is_map(module: nn.Module) -> bool:
    layer = getattr(module, "base_layer", module)
    return any(x.dim() > 1 for x in (*layer.parameters(), *layer.buffers()))


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


TOKENS = 8
# Two kernels of attention differ by rounding; experts may be chosen otherwise by it.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.1
_FEATURES = {
    "softcap": "soft-caps its attention logits",
    "s_aux": "has learned attention sinks",
    "position_bias": "adds a bias of positions to its attention logits",
}


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What an attention layer hands to the attention function.

    Attributes:
        module: The layer.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Size of a query and of a key.
        value_dim: Size of a value.
        scale: Factor of the logits.
        sliding: Whether a window limits what is read.
    """

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    sliding: bool


class _RefusedError(ValueError):
    """A call is none that block-sparse attention computes."""


def attention_calls(
    model: Any, device: torch.device, *, compare: bool = True
) -> list[AttentionCall]:
    """Runs a model on a few tokens and lists its calls of attention, in order.

    Args:
        model: Of transformers, with weights.
        device: Where it takes its tokens.
        compare: Whether its own attention must give the same as plain causal attention.

    Raises:
        ValueError: If it does not call the attention interface, hands it what block-sparse
            attention does not compute, or gives other outputs by plain causal attention.
    """
    calls: list[AttentionCall] = []
    expected: Tensor | None = None
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(_devices(model)):
        if compare:
            with _refusing(f"a pass over {TOKENS} tokens ended in an error"):
                expected = _output(model, device)
        with (
            _listening(model, calls),
            _refusing("it computes with its masks, or wants others than causal ones"),
        ):
            found = _output(model, device)
    if not calls:
        layers = {type(m).__name__ for m in model.modules() if hasattr(m, "layer_idx")}
        shown = f" (layers: {', '.join(sorted(layers)[:6])})" if layers else ""
        raise ValueError(
            f"no layer calls attention through the attention interface of transformers{shown}."
        )
    if expected is not None and not expected.isfinite().all():
        raise ValueError(
            f"its own output for {TOKENS} tokens is not finite: weights are damaged, or the dtype "
            "is too narrow for it."
        )
    error = 0.0 if expected is None else _difference(found, expected)
    if not error <= _TOLERANCE.get(found.dtype, _HALF_TOLERANCE):
        raise ValueError(
            f"causal attention over its queries, keys and values gives other outputs than its own "
            f"attention (relative difference {error:.2g} on {TOKENS} tokens)."
        )
    return calls


def _difference(found: Tensor, expected: Tensor) -> float:
    size = expected.double().norm().clamp(min=1e-30)
    return float((found.double() - expected.double()).norm() / size)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Makes of any error a sentence that says why the model is refused."""
    try:
        yield
    except (_RefusedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{what} ({type(error).__name__}: {line[:200]}).") from error


def _output(model: Any, device: torch.device) -> Tensor:
    # Small numbers are often special tokens.
    ids = torch.arange(4, 4 + TOKENS, device=device)[None]
    vocabulary = getattr(model.config, "vocab_size", None)
    found = model(input_ids=ids % vocabulary if vocabulary else ids, use_cache=False)[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"a pass over {TOKENS} tokens returned no tensor.")
    return found


@contextmanager
def _listening(model: Any, calls: list[AttentionCall]) -> Iterator[None]:
    """While open, attention is plain causal and every call of it is noted."""

    def listen(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **others: Any,
    ) -> tuple[Tensor, None]:
        _refuse(module, others)
        sliding = others.get("sliding_window") is not None
        if is_compact(attention_mask, query.shape[0], key.shape[2]):
            attention_mask = token_mask(attention_mask, query.shape[2], key.shape[2])
        elif sliding or _has_window(module):
            sliding = True
        else:
            raise _RefusedError(
                f"{type(module).__name__} hands its attention a mask of the model's own making."
            )
        scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        calls.append(AttentionCall(module, *sizes, scale, sliding))
        out = F.scaled_dot_product_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attention_mask,
            is_causal=attention_mask is None,
            scale=scale,
            enable_gqa=sizes[0] != sizes[1],
        )
        return out.transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    # transformers gives names with "flash" or "/" a meaning of their own.
    name = f"dilated_block_probe_{id(model)}"
    AttentionInterface.register(name, listen)
    AttentionMaskInterface.register(name, compact_mask)
    try:
        # Of others transformers would warn.
        if model._can_set_attn_implementation():
            model.set_attn_implementation(name)
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            # There is no other way to forget a name.
            interface._global_mapping.pop(name)


def _refuse(module: nn.Module, others: dict[str, Any]) -> None:
    """Raises an error if an attention layer asks for more than causal attention."""
    for name, value in others.items():
        if value is None or name in ("position_ids", "cache_position"):
            continue
        if name in _FEATURES:
            raise _RefusedError(
                f"it {_FEATURES[name]} ({name}), which block-sparse attention does not compute."
            )
        if isinstance(value, Tensor):
            raise _RefusedError(
                f"{type(module).__name__} hands its attention a tensor that block-sparse attention "
                f"knows nothing of ({name})."
            )
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise _RefusedError("it attends in both directions; only causal models are supported.")


def _has_window(module: Any) -> bool:
    config: Any = getattr(module, "config", None)
    kinds, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and number is not None:
        return any(word in kinds[number] for word in ("sliding", "chunk"))
    return getattr(config, "sliding_window", None) is not None


def _devices(model: nn.Module) -> list[int]:
    found = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    return sorted(index for index in found if index is not None)
