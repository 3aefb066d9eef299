"""What PyTorch asks of layers: number types, tracing, calls through hooks, shapes for sharding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# Not those of 8 bits and fewer: they store numbers, and PyTorch has no arithmetic for them.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_floating(name: str, x: object) -> None:
    """Raises TypeError unless an argument of this name is a tensor of one of :data:`FLOATS`."""
    wanted = "be floating point (float16, bfloat16, float32 or float64)"
    _check(name, x, FLOATS, wanted, "cast it to one of them")


def check_integers(name: str, x: object) -> None:
    """Raises TypeError unless an argument is a tensor of one of :data:`INTEGERS`."""
    _check(name, x, INTEGERS, "hold integers", "call .long() on it")


def check_booleans(name: str, x: object) -> None:
    """Raises TypeError unless an argument is a tensor of booleans."""
    _check(name, x, (torch.bool,), "hold booleans", "call .bool() on it")


def _check(name: str, x: object, dtypes: Sequence[torch.dtype], wanted: str, remedy: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}.")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must {wanted}, got {x.dtype}; {remedy}.")


def tracing() -> bool:
    """Whether a program is compiled or recorded, so that values cannot be looked at.

    A tensor that is made then is no good for later calls either: it is a symbol, or its memory
    belongs to a graph.
    """
    return (
        torch.compiler.is_compiling()
        or recording()
        # Tensors of a FakeTensorMode have shapes alone.
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    )


def recording() -> bool:
    """Whether the current stream is recorded as a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


Result = TypeVar("Result")


class CalledModule(nn.Module):
    """A module that computes other things than its forward pass as calls of itself, too.

    Whoever keeps parameters elsewhere (offloading to the CPU or a disk, sharding) brings them by
    hooks around a call, and takes them away after it: a method that reads them without a call finds
    nothing there, or what is left of another call. So ``forward`` of such a module takes
    ``compute``, which it calls with its inputs in place of its own work, and methods that read
    parameters go through :meth:`called`.

    Calls must not be nested: the inner one would take the parameters away from the outer one.
    What runs inside a call reads the parameters itself.
    """

    def called(self, compute: Callable[..., Result], *inputs: Any) -> Result:
        """Runs ``compute`` as a call of this module.

        Args:
            compute: Reads this module's own parameters; those of submodules in calls of theirs. It
                is called with the inputs as hooks have left them, such as moved or cast.
            *inputs: What ``forward`` is given by position.
        """
        result: Result = self(*inputs, compute=compute)
        return result


class FormerScalars(nn.Module):
    """A module whose parameters of shape ``(1,)`` also load from tensors without a dimension.

    FSDP2 (``fully_shard``) refuses parameters without a dimension.
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = dict(state_dict)
        for name, own in self._parameters.items():
            if own is not None and own.shape == (1,) and prefix + name in given:
                given[prefix + name] = with_dimension(given[prefix + name])
        super()._load_from_state_dict(given, prefix, *args, **kwargs)


def checksum_of(weight: Tensor) -> Tensor:
    """The sum of a weight's elements as integers of their bits, 0-dim: exact in any order."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().view(bits).sum()


def with_dimension(saved: Any) -> Any:
    """A tensor without a dimension as one of shape ``(1,)``; anything else as it is."""
    return saved.reshape(1) if isinstance(saved, Tensor) and saved.dim() == 0 else saved
