"""Buffers that keep their precision, and what the host knows of the values in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake


class ExactBuffers(nn.Module):
    """A module whose own buffers move with it but are never cast.

    They are settings and measurements, not weights: 0.9 in bfloat16 is 0.8984.
    """

    def initial_buffers(self) -> dict[str, Tensor]:
        """What buffers hold that got memory without values (``meta``, ``to_empty``), by name."""
        return {}

    def writable(self, name: str) -> Tensor:
        """One of the buffers, to be set from outside.

        Raises:
            RuntimeError: If it is on the meta device, where nothing can be written.
        """
        buffer = self.get_buffer(name)
        if buffer.is_meta:
            raise RuntimeError(
                f"{name} is on the meta device, where nothing can be written; set it before the "
                "model is offloaded, or offload without offload_buffers=True; a model that was "
                "made on the meta device needs memory first (to_empty)."
            )
        return buffer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None:
                continue
            if old.is_meta and not new.is_meta:
                value = self.initial_buffers().get(name, new)
                self._buffers[name] = value.to(new.device, old.dtype)
            elif new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = dict(state_dict)
        for name, own in self._buffers.items():
            saved = given.get(prefix + name)
            if own is not None and isinstance(saved, Tensor):
                given[prefix + name] = _widened(saved, own.dtype)
        super()._load_from_state_dict(given, prefix, *args, **kwargs)


def _widened(saved: Tensor, dtype: torch.dtype) -> Tensor:
    """A saved buffer in its own dtype; of a number that was cast, what it was set to.

    That is the shortest decimal number that is cast to it: 0.9 of 0.8984 in bfloat16.
    """
    cast = saved.is_floating_point() and torch.finfo(saved.dtype).bits < torch.finfo(dtype).bits
    if not cast or saved.dim() or saved.is_meta or not saved.isfinite():
        return saved.to(dtype)
    exact = float(saved)
    decimals = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    shortest = next(
        x for x in decimals if torch.tensor(x, dtype=saved.dtype, device="cpu") == exact
    )
    return torch.tensor(shortest, dtype=dtype, device=saved.device)


_T = TypeVar("_T")


class HostValues:
    """Reads tensors of a layer, and waits for a device only when a tensor has changed.

    A value that setters keep beside its tensor goes stale as soon as anybody else writes the
    tensor: an average of models, a checkpoint that is read in place, ``functional_call``. So the
    tensor itself is asked each time. Memory of the CPU is simply read. From another device a value
    is read anew when the tensor is another one, has other memory, or was written to since, which
    autograd counts (``Tensor._version``). It does not count writes to ``tensor.data``, nor those of
    a collective that is called on the tensor itself (``torch.distributed.broadcast``): on a
    device, follow them by a setter of the layer. What wrappers of PyTorch do is counted.
    """

    def __init__(self) -> None:
        self._notes: dict[str, tuple[Tensor, tuple[int, int], Any]] = {}

    def read(self, name: str, tensor: Tensor, convert: Callable[[Tensor], _T]) -> _T:
        """``convert(tensor)``, or what it gave for the same content.

        Args:
            name: Of the value: the last one of each name is kept.
            tensor: Holds it; see :func:`readable`.
            convert: Reads it, and depends on nothing else.
        """
        if not _counts_writes(tensor):
            return convert(tensor)
        state, noted = (tensor._version, tensor.data_ptr()), self._notes.get(name)
        if noted is None or noted[0] is not tensor or noted[1] != state:
            noted = (tensor, state, convert(tensor))
            self._notes[name] = noted
        found: _T = noted[2]
        return found

    def note(self, name: str, tensor: Tensor, value: Any) -> None:
        """Takes the value that was just written to a tensor, so that nobody has to wait for it."""
        if readable(tensor) and _counts_writes(tensor):
            self._notes[name] = (tensor, (tensor._version, tensor.data_ptr()), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostValues:
        # The notes are about other tensors than the copy's, whose writes are counted from 0.
        return HostValues()

    def __reduce__(self) -> tuple[type[HostValues], tuple[()]]:
        return HostValues, ()


def readable(tensor: Tensor) -> bool:
    """Whether a tensor holds values at all: those of ``meta`` and of recorded programs do not."""
    return not tensor.is_meta and not is_fake(tensor)


def host_property(read: Callable[[Any], Any]) -> Any:
    """A property whose value compiled graphs check at every call, and compile again if it differs.

    ``torch.compile`` takes a property in Python apart: it would look once at what the property
    reads, and never again at the values of tensors. A property whose getter is written in C it
    reads as it stands, while compiling and before every run of the graph; the lookup in a
    dictionary is one, and hands keys that are missing to Python.

    Args:
        read: Gets the object. Returns what ``torch.compile`` takes for constant of a module: an
            int, a bool, a tensor of the module, or a frozen dataclass of numbers and tuples.
    """
    return property(_Reader(read).__getitem__)


class _Reader(dict[Any, Any]):
    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, layer: Any) -> Any:
        return self._read(layer)


def _counts_writes(tensor: Tensor) -> bool:
    if tensor.device.type == "cpu" or tensor.is_inference():
        return False
    # Wrapped by torch.func, tensors have no memory of their own.
    return not torch._C._are_functorch_transforms_active()
