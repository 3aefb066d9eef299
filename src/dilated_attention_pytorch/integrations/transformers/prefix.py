"""Runs a model from one of its layers on, with what the layers before it made kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.integrations.transformers.observer import evaluating
from dilated_attention_pytorch.integrations.transformers.offloaded import input_device
from dilated_attention_pytorch.integrations.transformers.tune import next_token_loss


class KeptPrefix:
    """What enters one layer, for some windows: passes that differ behind it start there.

    Half of the work of measuring every layer is saved, for ``windows * length * hidden size``
    numbers kept.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, length + 1)``.
    """

    def __init__(self, adapted: AdaptedModel, windows: Tensor) -> None:
        self.model, self.windows = adapted.model, windows
        self._layers = decoder_layers(adapted)
        self._start = 0
        self._entering: list[Tensor] = []

    def move_to(self, number: int) -> None:
        """Keeps what enters a layer, computed by the layers before it as they are now."""
        if number < self._start:
            self._start, self._entering = 0, []
        if number > self._start:
            self._entering = [self._entering_at(number, i) for i in range(len(self.windows))]
            self._start = number

    def loss(self) -> float:
        """Mean cross entropy of the next token over the windows, in nats."""
        return sum(self._run(i) for i in range(len(self.windows))) / len(self.windows)

    def _run(self, index: int) -> float:
        window = self.windows[index : index + 1].to(input_device(self.model)).long()
        before = [self._layers[number] for number in range(self._start)]
        kept = skipped(before, self._entering[index]) if before else nullcontext()
        with evaluating(self.model), kept:
            return float(next_token_loss(self.model, window))

    def _entering_at(self, number: int, index: int) -> Tensor:
        found: list[Tensor] = []

        def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _EnoughError

        hook = self._layers[number].register_forward_pre_hook(look)
        try:
            self._run(index)
        except _EnoughError:
            return found[0]
        finally:
            hook.remove()
        raise RuntimeError(f"the model did not run its layer {number}.")


class _EnoughError(Exception):
    """Ends a pass whose rest nobody needs."""


def decoder_layers(adapted: AdaptedModel) -> list[nn.Module]:
    """The layers that hold the attention layers, in order."""
    parents = {child: module for module in adapted.model.modules() for child in module.children()}
    return [parents[site.module] for site in adapted.sites]


@contextmanager
def skipped(layers: list[nn.Module], output: Tensor) -> Iterator[None]:
    """While open, layers do nothing but return ``output``; afterwards nothing of it is left."""

    def give(*args: Any, **kwargs: Any) -> Tensor:
        return output

    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = give
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = own
