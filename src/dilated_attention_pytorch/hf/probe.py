"""A pass of a few tokens that shows how a model calls attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from dilated_attention_pytorch.analysis.recording import evaluation_mode
from dilated_attention_pytorch.hf.mask import compact_mask, is_compact, token_mask

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
