"""Cache layers of transformers that a selector's state follows, whatever happens to them."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.state import SelectorState


class FollowedState:
    """A selector's state, and what proves that it belongs to the keys of a cache layer.

    Whoever changes the keys of a cache makes another tensor of them or raises the tensor's version;
    whoever changes the selector raises the version of a weight or buffer. Inference tensors have no
    version: there, keys that are edited in place behind the cache's back go unnoticed.

    The state counts the places of the cache, padding included: its ``num_tokens``.

    Args:
        selector: Whose state it is.
        state: What the selector remembers of the cache.

    Attributes:
        seen: ``(batch, num_tokens)`` booleans: places that hold tokens and no padding; None: all.
    """

    def __init__(self, selector: BlockSparseAdaptive, state: SelectorState) -> None:
        self.state = state
        self.seen: Tensor | None = None
        self._selector = weakref.ref(selector)
        # Where every weight and module hangs, and what hung there: walking through modules anew is
        # slower than all else that a token costs the host.
        self._places = [
            (place, dict(place))
            for module in selector.modules()
            for place in (module._parameters, module._buffers, module._modules)
        ]
        self._weights = [
            x for _, then in self._places for x in then.values() if isinstance(x, Tensor)
        ]
        self._weight_versions = [_version(x) for x in self._weights]
        self._keys: weakref.ref[Tensor] | None = None
        self._keys_version = 0

    def seal(self, keys: Tensor) -> None:
        """Says that the state has seen ``keys`` as they are now."""
        self._keys, self._keys_version = weakref.ref(keys), _version(keys)

    def holds(self, keys: Tensor | None) -> bool:
        """Whether ``keys`` are what the state has seen."""
        sealed = None if self._keys is None else self._keys()
        return sealed is not None and keys is sealed and _version(sealed) == self._keys_version

    def belongs_to(self, selector: BlockSparseAdaptive) -> bool:
        """Whether it is this selector's, and the selector has not changed."""
        if self._selector() is not selector:
            return False
        for place, then in self._places:
            if place.keys() != then.keys():
                return False
            for name, was in then.items():
                # Of offloaded weights every call has other objects.
                if (now := place[name]) is was:
                    continue
                if not all(getattr(x, "is_meta", False) for x in (now, was)):
                    return False
        return [_version(x) for x in self._weights] == self._weight_versions

    def reorder(self, samples: Tensor) -> None:
        """Goes on with what ``samples`` were."""
        self.state.reorder(samples.to(self.state.lengths.device))
        if self.seen is not None:
            self.seen = self.seen.index_select(0, samples.to(self.seen.device))

    def retract(self, count: int) -> bool:
        """Forgets the newest ``count`` places; False if the state does not reach so far back."""
        if count > self.state.retractable:
            return False
        tokens = None
        if self.seen is not None:
            self.seen, gone = self.seen.split([self.seen.shape[1] - count, count], 1)
            tokens = gone.sum(1)
        self.state.retract(count, tokens)
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> FollowedState | None:
        """The state of a copied cache; None if the cache was changed before."""
        keys = None if self._keys is None else self._keys()
        selector = self._selector()
        if keys is None or selector is None or not (self.holds(keys) and self.belongs_to(selector)):
            return None
        twin = FollowedState(selector, copy.deepcopy(self.state, memo))
        twin.seen = self.seen
        # The cache's own copy of its keys: the memo has it or will.
        twin.seal(copy.deepcopy(keys, memo))
        return twin

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A cache that was saved and loaded has other keys.
        return type(None), ()


class FollowedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer that takes a selector's state along when its samples or tokens change.

    Attributes:
        followed: The state, or None.
    """

    followed: FollowedState | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Moves samples, as beam search does."""
        intact = self.intact()
        super().reorder_cache(beam_idx)
        self._go_on(intact, beam_idx)

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()
        self.followed = None

    def intact(self) -> FollowedState | None:
        """The state if it has seen the keys as they are; one that has not is dropped."""
        if self.followed is not None and not self.followed.holds(self.keys):
            self.followed = None
        return self.followed

    def _go_on(self, followed: FollowedState | None, samples: Tensor | None = None) -> None:
        """Follows the keys as they are now, which are those of ``samples`` before."""
        if followed is None:
            return
        if samples is not None:
            followed.reorder(samples)
        followed.seal(self.keys)


class FollowedDynamicLayer(FollowedLayer, DynamicLayer):  # type: ignore[misc]
    """A growing cache layer with a state."""

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Removes the newest tokens."""
        followed, before = self.intact(), self.get_seq_length()
        super().crop(*args, **kwargs)
        removed = before - self.get_seq_length()
        if followed is not None and followed.retract(removed):
            self._go_on(followed)
        else:
            self.followed = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sample."""
        followed = self.intact()
        super().batch_repeat_interleave(repeats)
        if followed is not None:
            samples = torch.arange(len(followed.state.lengths), device=self.keys.device)
            self._go_on(followed, samples.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some samples."""
        followed = self.intact()
        super().batch_select_indices(indices)
        if followed is not None:
            samples = torch.arange(len(followed.state.lengths), device=self.keys.device)
            self._go_on(followed, samples[indices])


class FollowedStaticLayer(FollowedLayer, StaticLayer):  # type: ignore[misc]
    """A cache layer of fixed size with a state."""


_FOLLOWED = {DynamicLayer: FollowedDynamicLayer, StaticLayer: FollowedStaticLayer}


class CacheHandle:
    """The cache of one attention layer, as it was before the new tokens came.

    Args:
        cache: Of the model.
        number: The layer's number.
        selector: The layer's selector.

    Attributes:
        followed: The state that has seen all that the cache held, or None.
    """

    def __init__(self, cache: Any, number: int, selector: BlockSparseAdaptive) -> None:
        self._cache, self._number, self.selector = cache, number, selector
        layer = self._layer()
        followed = layer.intact() if isinstance(layer, FollowedLayer) else None
        if followed is not None and not followed.belongs_to(selector):
            followed = None
        self.followed = followed

    def can_keep(self, keys: Tensor) -> bool:
        """Whether a state can follow the layer, which returned ``keys`` after its update.

        Quantised, offloaded and sliding layers hand out other tensors than they hold.
        """
        layer = self._layer()
        kind = type(layer)
        return (kind in _FOLLOWED or issubclass(kind, FollowedLayer)) and layer.keys is keys

    def keep(self, state: SelectorState, seen: Tensor | None) -> None:
        """Lets a state that has ``seen`` the updated cache follow it."""
        layer = self._layer()
        if type(layer) in _FOLLOWED:
            # The object stays, whoever holds it; so do its copies what they are.
            layer.__class__ = _FOLLOWED[type(layer)]
        followed = self.followed
        if followed is None or followed.state is not state:
            followed = FollowedState(self.selector, state)
        followed.seen = seen
        followed.seal(layer.keys)
        layer.followed = followed

    def drop(self) -> None:
        """Follows the layer no longer."""
        layer = self._layer()
        if isinstance(layer, FollowedLayer):
            layer.followed = None

    def _layer(self) -> Any:
        # Caches without a model's configuration make their layers when they are updated.
        layers = getattr(self._cache, "layers", ())
        return layers[self._number] if self._number < len(layers) else None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
