"""Selection at the pace of the attention kernels; PyTorch has it in ``scoring``, ``selection``."""

from dilated_attention_pytorch.ops.block_selection.interface import (
    kernel_refusal,
    summarise,
    transpose_lists,
)

__all__ = ["kernel_refusal", "summarise", "transpose_lists"]
