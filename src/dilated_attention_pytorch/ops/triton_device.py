"""What the launchers of Triton kernels ask of tensors and devices."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of ``(b, n, h, d)``."""
    return x.stride(0), x.stride(2), x.stride(1)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The CUDA compute capability; asked once."""
    return torch.cuda.get_device_capability(device)


def on_device(device: torch.device) -> Any:
    """Kernels launch on the current device: makes it the tensors' one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
