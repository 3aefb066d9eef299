"""Gives every parameter of a layer a gradient, which ``DistributedDataParallel`` waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


def is_distributed() -> bool:
    """Whether a process group is at work."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reach_all_parameters(out: Tensor, module: nn.Module) -> Tensor:
    """Passes ``out`` on; its backward pass adds zeros to the gradient of every parameter.

    Without ``get_sparsity_loss`` nothing reaches gain and offset of the adaptive budget, and with
    ``selector_weight=0`` nothing reaches the scorer.

    Args:
        out: Output of ``module``.
        module: Whose parameters to reach.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    reached: Tensor = _Reach.apply(out, *parameters)
    return reached


class _Reach(Function):
    @staticmethod
    def forward(out: Tensor, *parameters: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)
