"""What the launches share: steps from sample to sample, overlap with the kernel before."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.triton_device import capability


def batch_stride(x: Tensor) -> int:
    """Stride of the batch, 0 where all samples share one entry."""
    return x.stride(0) if x.shape[0] > 1 else 0


def plane_strides(x: Tensor | None) -> tuple[int, int]:
    """The same for batch and head."""
    if x is None:
        return 0, 0
    return batch_stride(x), x.stride(1) if x.shape[1] > 1 else 0


def per_sample(valid: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    return (stand_in, 0) if valid is None else (valid.view(torch.uint8), batch_stride(valid))


def overlap(device: torch.device) -> dict[str, bool]:
    """Arguments of kernels that are launched before their predecessor has ended.

    They are short: most of what they would take alone is the way from one to the next.
    """
    if kernels.INTERPRETED or capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
