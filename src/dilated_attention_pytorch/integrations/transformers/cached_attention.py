"""Attention of an adapted layer over a cache: by a state that follows the cache, where it can."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.cache_step import CacheStep
from dilated_attention_pytorch.integrations.transformers.followed_cache import CacheHandle
from dilated_attention_pytorch.integrations.transformers.padding import CompactTokens
from dilated_attention_pytorch.nn.selector_state import SelectorState

# With query_scope="block" every token chooses for itself: of more tokens at once the layer looks at
# the whole cache. With 8,192 tokens cached (9 heads, one busy CPU thread) 4, 16 and 64 tokens took
# 24, 94 and 377 ms, the layer 16 ms; drafts should be judged as the same tokens one by one.
MOST_CHOICES = 8


class CachedAttention:
    """One call of an adapted attention layer that has a cache.

    Args:
        handle: The layer's cache and selector.
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``, all that the updated cache holds.
        value: Shaped like ``key``.
        mask: From :func:`compact_mask`.
        step: What the mask says.
    """

    def __init__(
        self,
        handle: CacheHandle,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        step: CacheStep,
    ) -> None:
        self.selector, self.handle = handle.selector, handle
        self.mask, self.step = mask, step
        # A static cache has room behind the newest token.
        self.query, self.key, self.value = query, key[:, : step.end], value[:, : step.end]

    def attend(self) -> Tensor | None:
        """The output if a state gives it; None if the layer must look at the whole cache.

        Then the state has not been updated; call :meth:`remember` afterwards.
        """
        step, followed = self.step, self.handle.followed
        if step.place == 0:
            return self._prefill()
        if followed is None or followed.state.num_tokens != step.place:
            return None
        if not (step.whole and step.agrees(followed.state.starts)):
            return None
        q_len = self.query.shape[1]
        if self.selector.config.query_scope == "block" and q_len > MOST_CHOICES:
            return None
        out = self.selector.decode(self.query, self.key, self.value, followed.state)
        self.handle.keep(followed.state)
        return out

    def _prefill(self) -> Tensor:
        state = SelectorState()
        if self.step.starts is None:
            out = self.selector.prefill(self.query, self.key, self.value, state)
        else:
            tokens = self._compact()
            out = tokens.spread(
                self.selector.prefill(
                    *tokens.compact(self.query, self.key, self.value), state,
                    key_lengths=tokens.key_lengths, starts=self.step.starts,
                )
            )  # fmt: skip
        self.handle.keep(state)
        return out

    def remember(self) -> None:
        """Fills a state with all that the cache holds, for the tokens to come.

        Queries of the past are known as far as the state before has followed the cache.
        """
        step, followed = self.step, self.handle.followed
        state = SelectorState()
        if followed is not None and followed.state.num_tokens == step.place:
            state = followed.state
        if step.starts is None:
            offset = torch.full(
                (len(self.query),), step.place, dtype=torch.long, device=self.query.device
            )
            self.selector.remember(self.query, self.key, state, query_offset=offset)
        else:
            tokens = self._compact()
            query, key, _ = tokens.compact(self.query, self.key, self.value)
            self.selector.remember(
                query, key, state, key_lengths=tokens.key_lengths, starts=step.starts,
                query_offset=tokens.query_offset,
            )  # fmt: skip
        self.handle.keep(state)

    def _compact(self) -> CompactTokens:
        mask = self.mask[..., : self.step.end]
        return CompactTokens.of(mask[:, 0, 0].bool(), mask[:, 0, 1, 0], self.query.shape[1])


def cached_attention(
    handle: CacheHandle,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    cached_keys: Tensor,
) -> CachedAttention | None:
    """The call, if a state may follow this layer's cache.

    Args:
        handle: The layer's cache.
        query: As for :class:`CachedAttention`.
        key: Likewise.
        value: Likewise.
        mask: Likewise.
        cached_keys: The keys as the cache returned them.
    """
    step = CacheStep.of(mask, query.shape[1], key.shape[1])
    if step is None or not handle.can_keep(cached_keys):
        handle.drop()
        return None
    return CachedAttention(handle, query, key, value, mask, step)
