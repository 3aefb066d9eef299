"""The number types that the library computes with, and the checks that inputs have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Not those of 8 bits and fewer: they store numbers, and PyTorch has no arithmetic for them.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_floating(name: str, x: object) -> None:
    """Checks that an argument is a tensor of one of :data:`FLOATS`.

    Args:
        name: Of the argument, for the error.
        x: The argument.

    Raises:
        TypeError: If it is not.
    """
    wanted = "be floating point (float16, bfloat16, float32 or float64)"
    _check(name, x, FLOATS, wanted, "cast it to one of them")


def check_integers(name: str, x: object) -> None:
    """The same with :data:`INTEGERS`; booleans are none."""
    _check(name, x, INTEGERS, "hold integers", "call .long() on it")


def check_booleans(name: str, x: object) -> None:
    """The same with booleans."""
    _check(name, x, (torch.bool,), "hold booleans", "call .bool() on it")


def _check(name: str, x: object, dtypes: Sequence[torch.dtype], wanted: str, remedy: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}.")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must {wanted}, got {x.dtype}; {remedy}.")
