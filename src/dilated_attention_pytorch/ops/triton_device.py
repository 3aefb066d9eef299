"""What Triton kernels and their launches share; whoever imports this needs Triton."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that follow from lengths. Triton would compile anew for each way of being 1 or a multiple
# of 16, which with varying lengths is dozens of variants; the wide loads do not depend on them, but
# for the scores' (EVEN).
VARYING = (
    "length", "blocks", "y_length", "y_blocks", "num_rows", "num_query_rows", "num_key_rows",
    "columns", "num_keys", "words", "width", "tiles", "steps", "fixed_count", "explore",
    "v_stride_b", "x_valid_stride_b", "y_valid_stride_b", "starts_stride_b",
    "r_stride_b", "d_stride_b", "o_stride_b", "f_stride_b", "f_stride_h",
    "l_stride_b", "l_stride_h", "e_stride_b", "e_stride_h",
    "t_stride_b", "t_stride_h", "a_stride_b", "c_stride_b", "c_stride_h", "c_stride_i",
    "m_stride_b", "m_stride_h",
)  # fmt: skip

# Three products of TF32 parts on tensor cores: about float32's error, in a fraction of its time.
PRECISE = tl.constexpr("tf32x3")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def follow(PDL: tl.constexpr):
    """Lets the next kernel be launched while this one runs, and waits for the one before.

    With programmatic dependent launch a kernel starts before its predecessor has ended. Each waits
    before it reads or writes anything, so that all earlier kernels have ended too.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def nearest(x):
    """int64: the nearest integer of a number that is not negative, halves to the even one.

    Exact where x is: scaling by a power of two before does not round.
    """
    whole = tl.floor(x)
    rest = x - whole
    units = whole.to(tl.int64)
    return units + ((rest > 0.5) | ((rest == 0.5) & (units % 2 != 0))).to(tl.int64)


# Triton reads TRITON_INTERPRET when a kernel is defined.
INTERPRETED = not isinstance(follow, triton.JITFunction)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The CUDA compute capability; asked once."""
    return torch.cuda.get_device_capability(device)


def on_device(device: torch.device) -> Any:
    """Kernels launch on the current device: makes it the tensors' one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def overlap(device: torch.device) -> dict[str, bool]:
    """Arguments of kernels that are launched before their predecessor has ended.

    They are short: most of what they would take alone is the way from one to the next.
    """
    if INTERPRETED or capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of ``(b, n, h, d)``."""
    return x.stride(0), x.stride(2), x.stride(1)


def batch_stride(x: Tensor) -> int:
    """Stride of the batch, 0 where all samples share one entry."""
    return x.stride(0) if x.shape[0] > 1 else 0


def plane_strides(x: Tensor) -> tuple[int, int]:
    """Strides of batch and head, 0 where all share one entry."""
    return batch_stride(x), x.stride(1) if x.shape[1] > 1 else 0
