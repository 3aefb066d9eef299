"""The attention function that adapted models call, with and without a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dilated_attention_pytorch.config import as_int
from dilated_attention_pytorch.hf.cache import CacheHandle
from dilated_attention_pytorch.hf.mask import (
    OFFSET,
    PACKED,
    PLAIN,
    CacheStep,
    CompactTokens,
    Part,
    check_compact,
    compact_mask,
    token_mask,
)
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.decode import decoding_unsupported_reason
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.runtime import tracing

# transformers gives names with "flash" or "/" a meaning of their own.
ATTENTION_NAME = "dilated_block_sparse"
# Name of the submodule that makes an attention layer sparse.
SELECTOR = "block_selector"
# Name of the argument by which such a layer's pre-hook hands over the cache.
CACHE = "block_selector_cache"
# With query_scope="block" every token chooses for itself: of more tokens at once the layer looks at
# the whole cache. With 8,192 tokens cached (9 heads, one busy CPU thread) 4, 16 and 64 tokens took
# 24, 94 and 377 ms, the layer 16 ms; drafts should be judged as the same tokens one by one.
MOST_CHOICES = 8
# Name of the attribute by which a selector knows its DenseBelow.
_DENSE_BELOW = "dense_below"


@dataclass(frozen=True)
class DenseBelow:
    """Below how many tokens an adapted model attends densely, where sparse attention is slower.

    Counted are the keys of a pass, those of the cache among them; a static cache has as many as it
    has room for where nobody follows it, as in compiled passes. Training and whoever records
    patterns are left out.

    Attributes:
        prefill: For passes over several tokens; 0: never.
        generation: For passes over one token; 0: never.

    Raises:
        TypeError: If a number is no int.
        ValueError: If one is negative.
    """

    prefill: int = 0
    generation: int = 0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("prefill", "generation"):
            if as_int(name, getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")

    @classmethod
    def of(cls, selector: BlockSparseLayer) -> DenseBelow:
        """What a selector was told."""
        told: DenseBelow = selector.__dict__.get(_DENSE_BELOW, _ALWAYS_SPARSE)
        return told

    def tell(self, selector: BlockSparseLayer) -> None:
        """Tells a selector."""
        setattr(selector, _DENSE_BELOW, self)

    def holds(self, selector: BlockSparseLayer, q_len: int, kv_len: int) -> bool:
        """Whether a pass of the layer is dense."""
        least = self.generation if q_len == 1 else self.prefill
        return kv_len < least and not (selector.training or selector.observed)


_ALWAYS_SPARSE = DenseBelow()


def register() -> str:
    """Registers attention and mask function under one name; calling it again changes nothing.

    Without the mask function models would pass no mask, and padding would be ignored.

    Returns:
        The name, for ``model.set_attn_implementation``. A model without selectors then runs
        PyTorch's attention; :func:`adapt` does both.

    Example:
        >>> register()
        'dilated_block_sparse'
    """
    AttentionInterface.register(ATTENTION_NAME, block_sparse_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, compact_mask)
    return ATTENTION_NAME


def block_sparse_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; transformers calls it.

    Layers without a selector (dense layers, sliding windows) run PyTorch's attention; the others,
    too, where :class:`DenseBelow` says so.

    Args:
        module: The model's attention layer; its selector decides which blocks are read.
        query: ``(batch, num_heads, q_len, head_dim)``, after rotary positions.
        key: ``(batch, num_kv_heads, kv_len, head_dim)``, with what the cache holds.
        value: Shaped like ``key``.
        attention_mask: From :func:`compact_mask`.
        scaling: Factor of the logits.
        dropout: Must be 0.
        **others: What models hand to any attention function.

    Returns:
        ``(batch, q_len, num_heads, head_dim)``, and None in the place of the weights, which are
        never formed.

    Raises:
        ValueError: If a mask of single pairs, dropout or the attention weights are asked for.
    """
    selector: BlockSparseLayer | None = module._modules.get(SELECTOR)  # type: ignore[assignment]
    handle: CacheHandle | None = others.pop(CACHE, None)
    cached_keys = key
    # Under autocast rotary positions leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)

    def densely() -> tuple[Tensor, None]:
        seen = attention_mask
        if isinstance(seen, Tensor) and seen.dtype == torch.int32:
            seen = token_mask(seen, query.shape[2], key.shape[2])
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, seen, dropout=dropout, scaling=scaling, **others
        )
        return out

    if selector is None:
        return densely()
    if dropout:
        raise ValueError(
            f"attention_dropout must be 0, got {dropout}: block-sparse attention never forms the "
            "weights that it would drop."
        )
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False: block-sparse attention never forms the weights."
        )
    if scaling is not None and selector.scale is not None and scaling != selector.scale:
        raise ValueError(
            f"scaling must be {selector.scale}, which the selector was made for, got {scaling}."
        )
    mask = check_compact(attention_mask, query.shape[0], key.shape[2])
    step = None if handle is None else CacheStep.of(mask, query.shape[2], key.shape[2])
    tokens = key.shape[2] if step is None else step.end
    dense = DenseBelow.of(selector).holds(selector, query.shape[2], tokens)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if handle is not None:
        if not dense and step is not None and handle.can_keep(cached_keys):
            return CachedAttention(handle, q, k, v, mask, step).attend().contiguous(), None
        handle.drop()
    if dense:
        return densely()
    # Some models take a view of it.
    return whole_attention(selector, q, k, v, mask).contiguous(), None


def whole_attention(
    selector: BlockSparseLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> Tensor:
    """A layer over all keys, ``(batch, seq_len, num_heads, head_dim)``, with what the mask says."""
    kind, q_len, kv_len = mask.shape[2], query.shape[1], key.shape[1]
    settings: dict[str, Any] = {"is_causal": True}
    tokens = None
    if kind == PACKED:
        settings["cu_seqlens"] = mask[:, 0, 0]
    elif kind != PLAIN:
        offset = mask[:, 0, -1, 0]
        if kind == OFFSET:
            # What a static cache holds beyond the last query was not written yet.
            lengths = (offset + q_len).clamp(max=kv_len)
            settings |= {"query_offset": offset, "key_lengths": lengths}
        else:
            tokens = CompactTokens.of(mask[:, 0, 0].bool(), offset, q_len)
            query, key, value = tokens.compact(query, key, value)
            settings |= {
                # Without a cache queries and keys are one sequence and need no offset.
                "query_offset": None if q_len == kv_len else tokens.query_offset,
                "key_lengths": tokens.key_lengths,
                "query_lengths": tokens.query_lengths,
            }
    out: Tensor = selector(query, key, value, **settings)
    return out if tokens is None else tokens.spread(out)


@dataclass(eq=False)
class CachedAttention:
    """One call of an adapted attention layer, over a cache that a selector's state can follow.

    Attributes:
        handle: The layer's cache and selector.
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``, all that the updated cache holds.
        value: Shaped like ``key``.
        mask: From :func:`compact_mask`.
        step: What the mask says.
    """

    handle: CacheHandle
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    step: CacheStep

    def attend(self) -> Tensor:
        """The output; a state that has seen all that the cache holds follows it then.

        Every sample gets what it would get alone: of each the state knows that its tokens are where
        they were, or the layer looks at its whole cache.
        """
        step, followed = self.step, self.handle.followed
        if step.place == 0 and not step.packed:
            state = SelectorState()
            out = self._prefill(state)
        elif step.packed or followed is None or followed.state.num_tokens != step.place:
            state = SelectorState()
            out = self._look_at_all(state)
        else:
            state = followed.state
            parts = step.parts(followed.seen)
            out = self._go_on(parts[0], state) if len(parts) == 1 else self._divided(parts, state)
        state.count(step.end)
        self.handle.keep(state, step.seen)
        return out

    def _prefill(self, state: SelectorState) -> Tensor:
        query, key, value = self._cached()
        if self.step.seen is None:
            return self.handle.selector.prefill(query, key, value, state)
        tokens = self._compact(self.step.seen)
        out = self.handle.selector.prefill(
            *tokens.compact(query, key, value), state, key_lengths=tokens.key_lengths
        )
        return tokens.spread(out)

    def _divided(self, parts: list[Part], state: SelectorState) -> Tensor:
        """The output of samples that go on in different ways."""
        out, seen = torch.zeros_like(self.query), self.step.seen
        for part in parts:
            # Of several parts each names its samples.
            samples: Tensor = part.samples  # type: ignore[assignment]
            own_seen = None if seen is None else seen[samples]
            own = CachedAttention(
                self.handle, self.query[samples], self.key[samples], self.value[samples],
                self.mask[samples], CacheStep(self.step.place, self.step.end, own_seen),
            )  # fmt: skip
            own_state = state.take(samples)
            out[samples] = own._go_on(part, own_state)
            state.put(samples, own_state)
        return out

    def _go_on(self, part: Part, state: SelectorState) -> Tensor:
        """The output of samples that are alike."""
        q_len, selector, seen = self.query.shape[1], self.handle.selector, self.step.seen
        if not part.followed:
            state.reset()
            return self._look_at_all(state)
        # As without the padding, where the first tokens are a prompt.
        one_by_one = not selector.past
        if one_by_one and (part.new > MOST_CHOICES or not part.begun):
            return self._look_at_all(state)
        query, key, value = self._cached()
        state.starts = part.starts
        if seen is None or (part.new == q_len and not part.gaps):
            return selector.decode(query, key, value, state)
        out = torch.zeros_like(query)
        tokens = self._compact(seen)
        if part.new:
            query, key, value = tokens.compact(query, key, value)
            state.starts = None
            out[:, : part.new] = selector.decode(query[:, : part.new], key, value, state)
        state.uniform = False
        return tokens.spread(out)

    def _look_at_all(self, state: SelectorState) -> Tensor:
        """The layer's output over the whole cache; fills the state for the tokens to come.

        Queries of the past are known as far as the state has followed the cache.
        """
        selector = self.handle.selector
        out = whole_attention(selector, self.query, self.key, self.value, self.mask)
        query, key, value = self._cached()
        if self.step.seen is None:
            offset = torch.full(
                (len(query),), self.step.place, dtype=torch.long, device=query.device
            )
            selector.remember(query, key, state, query_offset=offset)
            return out
        tokens = self._compact(self.step.seen)
        query, key, _ = tokens.compact(query, key, value)
        selector.remember(
            query, key, state, key_lengths=tokens.key_lengths, query_offset=tokens.query_offset
        )
        return out

    def _cached(self) -> tuple[Tensor, Tensor, Tensor]:
        # A static cache has room behind the newest token.
        return self.query, self.key[:, : self.step.end], self.value[:, : self.step.end]

    def _compact(self, seen: Tensor) -> CompactTokens:
        offset = torch.full((len(seen),), self.step.place, dtype=torch.long, device=seen.device)
        return CompactTokens.of(seen, offset, self.query.shape[1])


class CacheHandover:
    """Forward pre-hook of attention layers: adds a handle of the cache to what the layer passes on.

    transformers does not. Not while training, compiling, recording a CUDA graph or computing
    gradients, nor for selectors of which no state can be kept: they choose by all that the cache
    holds.
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


def takes_cache(layer: nn.Module) -> bool:
    """Whether an attention layer can be handed a cache: it is numbered and passes arguments on."""
    taken = inspect.signature(type(layer).forward).parameters.values()
    passes_on = any(own.kind is inspect.Parameter.VAR_KEYWORD for own in taken)
    return passes_on and getattr(layer, "layer_idx", None) is not None


def _registered() -> CacheHandover:
    register()
    return hand_over_cache


def _decodes(selector: BlockSparseAdaptive) -> bool:
    # Whoever observes the layer wants its forward pass. Hooks are run around any call of it, and
    # must not change what is generated by being there.
    return (
        not selector.training
        and not selector.observed
        and decoding_unsupported_reason(selector) is None
    )
