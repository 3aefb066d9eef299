"""Hands the cache to the attention function, which transformers does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dilated_attention_pytorch.integrations.transformers.attention import CACHE, SELECTOR
from dilated_attention_pytorch.integrations.transformers.followed_cache import CacheHandle
from dilated_attention_pytorch.integrations.transformers.register import ATTENTION_NAME, register
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.decoding import decoding_refusal
from dilated_attention_pytorch.tracing import tracing


class CacheHandover:
    """Forward pre-hook of attention layers: adds a handle of the cache to what the layer passes on.

    Not while training, compiling, recording a CUDA graph or computing gradients, nor for selectors
    of which no state can be kept: they choose by all that the cache holds.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Called before the layer."""
        cache = kwargs.get("past_key_values")
        if cache is None or torch.is_grad_enabled() or tracing():
            return None
        selector = module._modules.get(SELECTOR)
        if not isinstance(selector, BlockSparseAdaptive) or not _decodes(selector):
            return None
        if module.config._attn_implementation != ATTENTION_NAME:  # type: ignore[union-attr]
            return None
        number = int(module.layer_idx)  # type: ignore[arg-type]
        return args, {**kwargs, CACHE: CacheHandle(cache, number, selector)}

    def __reduce__(self) -> tuple[Callable[[], CacheHandover], tuple[()]]:
        """A model that was pickled knows its attention by name: loading it makes that known."""
        return _registered, ()


hand_over_cache = CacheHandover()


def _registered() -> CacheHandover:
    register()
    return hand_over_cache


def _decodes(selector: BlockSparseAdaptive) -> bool:
    # Whoever observes the layer wants its forward pass.
    observed = selector.observed or selector._forward_hooks or selector._forward_pre_hooks
    return not selector.training and not observed and decoding_refusal(selector) is None
