"""Attention of an adapted layer over a cache: by a state that follows the cache, where it can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.cache_step import CacheStep, Part
from dilated_attention_pytorch.integrations.transformers.followed_cache import CacheHandle
from dilated_attention_pytorch.integrations.transformers.padding import CompactTokens
from dilated_attention_pytorch.nn.state import SelectorState

# With query_scope="block" every token chooses for itself: of more tokens at once the layer looks at
# the whole cache. With 8,192 tokens cached (9 heads, one busy CPU thread) 4, 16 and 64 tokens took
# 24, 94 and 377 ms, the layer 16 ms; drafts should be judged as the same tokens one by one.
MOST_CHOICES = 8

# The layer's attention over a whole cache: query, key, value and mask give the output.
Whole = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class CachedAttention:
    """One call of an adapted attention layer that has a cache.

    Args:
        handle: The layer's cache and selector.
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``, all that the updated cache holds.
        value: Shaped like ``key``.
        mask: From :func:`compact_mask`.
        step: What the mask says.
        whole: The layer itself, for samples of which no state is known.
    """

    def __init__(
        self,
        handle: CacheHandle,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        step: CacheStep,
        whole: Whole,
    ) -> None:
        self.selector, self.handle = handle.selector, handle
        self.step, self.whole = step, whole
        self.query, self.key, self.value, self.mask = query, key, value, mask

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
            return self.selector.prefill(query, key, value, state)
        tokens = self._compact()
        out = self.selector.prefill(
            *tokens.compact(query, key, value), state, key_lengths=tokens.key_lengths
        )
        return tokens.spread(out)

    def _divided(self, parts: list[Part], state: SelectorState) -> Tensor:
        """The output of samples that go on in different ways."""
        out = torch.zeros_like(self.query)
        for part in parts:
            if part.samples is None:
                raise RuntimeError("parts of a batch must name their samples.")
            own = state.take(part.samples)
            out[part.samples] = self._of(part.samples)._go_on(part, own)
            state.put(part.samples, own)
        return out

    def _of(self, samples: Tensor) -> CachedAttention:
        """The same call for some samples."""
        seen = None if self.step.seen is None else self.step.seen[samples]
        return CachedAttention(
            self.handle, self.query[samples], self.key[samples], self.value[samples],
            self.mask[samples], CacheStep(self.step.place, self.step.end, seen), self.whole,
        )  # fmt: skip

    def _go_on(self, part: Part, state: SelectorState) -> Tensor:
        """The output of samples that are alike."""
        q_len = self.query.shape[1]
        one_by_one = self.selector.config.query_scope == "block"
        if not part.followed:
            state.reset()
            return self._look_at_all(state)
        # As without the padding, where the first tokens are a prompt.
        if one_by_one and (part.new > MOST_CHOICES or not part.begun):
            return self._look_at_all(state)
        query, key, value = self._cached()
        state.starts = part.starts
        if part.new == q_len and not part.gaps:
            return self.selector.decode(query, key, value, state)
        out = torch.zeros_like(query)
        tokens = self._compact()
        if part.new:
            query, key, value = tokens.compact(query, key, value)
            state.starts = None
            out[:, : part.new] = self.selector.decode(query[:, : part.new], key, value, state)
        state.uniform = False
        return tokens.spread(out)

    def _look_at_all(self, state: SelectorState) -> Tensor:
        """The layer's output over the whole cache; fills the state for the tokens to come.

        Queries of the past are known as far as the state has followed the cache.
        """
        out = self.whole(self.query, self.key, self.value, self.mask)
        query, key, value = self._cached()
        if self.step.seen is None:
            offset = torch.full(
                (len(query),), self.step.place, dtype=torch.long, device=query.device
            )
            self.selector.remember(query, key, state, query_offset=offset)
            return out
        tokens = self._compact()
        query, key, _ = tokens.compact(query, key, value)
        self.selector.remember(
            query, key, state, key_lengths=tokens.key_lengths, query_offset=tokens.query_offset
        )
        return out

    def _cached(self) -> tuple[Tensor, Tensor, Tensor]:
        # A static cache has room behind the newest token.
        return self.query, self.key[:, : self.step.end], self.value[:, : self.step.end]

    def _compact(self) -> CompactTokens:
        seen = self.step.seen
        if seen is None:
            raise RuntimeError("there is no padding to move.")
        offset = torch.full((len(seen),), self.step.place, dtype=torch.long, device=seen.device)
        return CompactTokens.of(seen, offset, self.query.shape[1])


def cached_attention(
    handle: CacheHandle,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    cached_keys: Tensor,
    whole: Whole,
) -> CachedAttention | None:
    """The call, if a state may follow this layer's cache.

    Args:
        handle: The layer's cache.
        query: As for :class:`CachedAttention`.
        key: Likewise.
        value: Likewise.
        mask: Likewise.
        cached_keys: The keys as the cache returned them.
        whole: As for :class:`CachedAttention`.
    """
    step = CacheStep.of(mask, query.shape[1], key.shape[1])
    if step is None or not handle.can_keep(cached_keys):
        handle.drop()
        return None
    return CachedAttention(handle, query, key, value, mask, step, whole)
