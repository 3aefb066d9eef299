"""Selection of the blocks whose expected mass reaches a threshold, with a fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.nn.block_sparse import (
    BlockSparseLayer,
    Selection,
    SelectionInputs,
)
from dilated_attention_pytorch.ops.block_selection.interface import (
    kernel_unsupported_reason,
    threshold_lists,
)
from dilated_attention_pytorch.pattern import BlockPattern


def backend_refusal(layer: BlockSparseLayer, device: torch.device) -> str | None:
    """Why a layer's backend leaves the selection on a device to PyTorch, or None."""
    if layer.backend not in ("auto", "triton"):
        return f"backend={layer.backend!r} asks for the PyTorch path"
    if layer.backend == "auto" and device.type != "cuda":
        return f"the PyTorch path runs on {device.type}"
    return None


def place_refusal(layer: BlockSparseLayer, inputs: SelectionInputs) -> str | None:
    """Why the selection kernels cannot run for this layer here, or None if they can."""
    query = inputs.query
    refusal = backend_refusal(layer, query.device)
    if refusal is not None:
        return refusal
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func takes the PyTorch path"
    width = inputs.rule.width(inputs.rows)
    return kernel_unsupported_reason(
        query.device, query.dtype, layer.block_size, layer.head_dim, width
    )


def select_above(
    inputs: SelectionInputs,
    scores: Tensor,
    threshold: float | Tensor,
    block_size: int,
    least: Tensor | None = None,
) -> Selection:
    """Keeps the forced blocks and those whose share of the softmaxed scores reaches a threshold.

    The choice of :func:`threshold_budget`; nothing waits for the device. No gradient.

    Args:
        inputs: What a layer chooses by; without segments.
        scores: ``(b, heads, i, j)`` of all key blocks.
        threshold: In [0, 1], for all rows or ``(1 or b, 1 or heads, 1 or i)``.
        block_size: Tokens per block.
        least: What a row keeps at least, from :func:`floor_budget`; None: its forced blocks.
    """
    rule, rows = inputs.rule, inputs.rows
    intervals = rows.remember((rule, "intervals"), lambda: rule.intervals(rows))
    counts, indices = threshold_lists(scores.detach(), intervals, threshold, least)
    pattern = BlockPattern(
        counts, indices, inputs.mask.q_len, inputs.mask.kv_len, (block_size, block_size),
        rows.num_allowed, check_values=False,
    )  # fmt: skip
    return Selection(pattern)
