"""Looks into a model's forward pass: what every block-sparse layer got, chose and returned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer, observe_passes
from dilated_attention_pytorch.nn.block_sparse import LayerPass as ObservedPass
from dilated_attention_pytorch.nn.inputs import SelectionInputs
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


@contextmanager
def watch_layers(model: nn.Module, observer: Callable[[LayerPass], None]) -> Iterator[None]:
    """Calls ``observer`` after every forward pass of every block-sparse layer, while open.

    Packed documents (``cu_seqlens``) are refused: their patterns count blocks per document. Passes
    whose pattern was given are left out.
    """
    names = {layer: name for name, layer in block_sparse_layers(model).items()}

    def show(seen: ObservedPass) -> None:
        if seen.inputs is None:
            return
        name = names[seen.layer]
        if seen.inputs.mask.document_ids is not None:
            raise ValueError(
                f"{name}: cu_seqlens must be None while a model is analysed; give every "
                "document as a sample of its own."
            )
        observer(
            LayerPass(
                name, seen.layer, seen.query, seen.key, seen.inputs, seen.pattern, seen.output
            )
        )

    with observe_passes(list(names), show):
        yield


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
