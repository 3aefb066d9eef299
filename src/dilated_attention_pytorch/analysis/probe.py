"""Looks into a model's forward pass: what every block-sparse layer got, chose and returned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dilated_attention_pytorch.nn.block_sparse import (
    BlockSparseLayer,
    Selection,
    SelectionInputs,
)
from dilated_attention_pytorch.pattern import BlockPattern


@dataclass(frozen=True, eq=False)
class LayerPass:
    """One forward pass of one layer.

    Attributes:
        name: Of the layer inside the model.
        layer: The layer.
        query: ``(batch, q_len, num_heads, head_dim)`` as attention reads it.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``, likewise.
        inputs: What the layer chose by.
        pattern: What it chose.
        output: What it returned, inside the autograd graph if there is one.
    """

    name: str
    layer: BlockSparseLayer
    query: Tensor
    key: Tensor
    inputs: SelectionInputs
    pattern: BlockPattern
    output: Tensor


class _Watch:
    """Gathers the parts of a pass as a layer's forward pass hands them out."""

    def __init__(
        self, name: str, layer: BlockSparseLayer, observer: Callable[[LayerPass], None]
    ) -> None:
        self.name, self.layer, self.observer = name, layer, observer
        self.tokens: tuple[Tensor, Tensor] | None = None
        self.choice: tuple[SelectionInputs, Selection] | None = None

    def before(self, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if options.get("cu_seqlens") is not None:
            raise ValueError(
                f"{self.name}: cu_seqlens must be None while a model is analysed; give every "
                "document as a sample of its own."
            )
        named = dict(zip(("query", "key"), args, strict=False)) | options
        self.tokens = named["query"], named["key"]

    def after(
        self, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any], result: Any
    ) -> None:
        output = result[0] if isinstance(result, tuple) else result
        if self.tokens is None or self.choice is None:
            return
        (query, key), (inputs, selection) = self.tokens, self.choice
        self.observer(
            LayerPass(self.name, self.layer, query, key, inputs, selection.pattern, output)
        )
        self.tokens = self.choice = None


@contextmanager
def watch_layers(model: nn.Module, observer: Callable[[LayerPass], None]) -> Iterator[None]:
    """Calls ``observer`` after every forward pass of every block-sparse layer, while open.

    Packed documents (``cu_seqlens``) are refused: their patterns count blocks per document.
    """
    with ExitStack() as stack:
        for name, layer in block_sparse_layers(model).items():
            watch = _Watch(name, layer, observer)
            stack.enter_context(_watched_selection(layer, watch))
            before = layer.register_forward_pre_hook(watch.before, with_kwargs=True)
            after = layer.register_forward_hook(watch.after, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


@contextmanager
def _watched_selection(layer: BlockSparseLayer, watch: _Watch) -> Iterator[None]:
    original = layer.select

    def select(inputs: SelectionInputs) -> Selection:
        selection = original(inputs)
        watch.choice = inputs, selection
        return selection

    # The attribute hides the method of the class until it is deleted.
    layer.select = select  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.select


def block_sparse_layers(model: nn.Module) -> dict[str, BlockSparseLayer]:
    """The block-sparse layers of a model by name (a bare layer is called ``"layer"``)."""
    return {
        name or "layer": module
        for name, module in model.named_modules()
        if isinstance(module, BlockSparseLayer)
    }


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules while open; afterwards every module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def call_model(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch.

    Args:
        model: The model, or a bare block-sparse layer.
        batch: A tensor, a tuple or list of positional arguments, a mapping of keyword arguments,
            or an object for a model that takes one. A bare layer takes one tensor as query,
            key and value.

    Raises:
        TypeError: If the model cannot be called with so many arguments, or not by these names.
    """
    if isinstance(batch, Mapping):
        _check_call(model, (), dict(batch))
        return model(**batch)
    if isinstance(batch, tuple | list):
        _check_call(model, tuple(batch), {})
        return model(*batch)
    if isinstance(model, BlockSparseLayer) and isinstance(batch, Tensor):
        return model(batch, batch, batch)
    return model(batch)


def _check_call(model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        holds = sorted(named) if named else f"{len(arguments)} entries"
        raise TypeError(
            f"a batch must hold what {type(model).__name__}.forward{signature} is called with, but "
            f"holds {holds} ({error}). Give a loader without labels and the like, such as "
            "((inputs,) for inputs, labels in loader)."
        ) from None
