"""Functions that pass a tensor on and act in its backward pass.

One guards the random numbers of a layer that activation checkpointing runs again, one gives every
parameter a gradient, which ``DistributedDataParallel`` waits for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from dilated_attention_pytorch.runtime import tracing


def generator_state(device: torch.device, generator: torch.Generator | None) -> Tensor | None:
    """The state of what a layer draws from, on the host; None where it cannot be asked for."""
    if tracing() or torch._C._are_functorch_transforms_active():
        return None
    if generator is None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    elif generator is None and device.type == "cpu":
        generator = torch.default_generator
    return None if generator is None else generator.get_state()


def watch_rng(query: Tensor, state: Tensor | None) -> Tensor:
    """Passes ``query`` on; its backward pass raises RuntimeError if a second run drew otherwise.

    The second run of ``torch.utils.checkpoint`` would then choose other blocks than the output was
    computed from, and the gradients would be wrong without a word. With ``use_reentrant=True`` the
    first run records no graph, so that nothing can be compared; nor can compiled code.

    Args:
        query: What attention reads.
        state: From :func:`generator_state`, before the layer drew anything; None: not watched.
    """
    if state is None or not query.requires_grad:
        return query
    watched: Tensor = _Watch.apply(query, state)
    return watched


class _Watch(Function):
    @staticmethod
    def forward(query: Tensor, state: Tensor) -> Tensor:
        return query.view_as(query)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        # Checkpointing replaces what is saved by what the second run saved, and nothing else.
        ctx.save_for_backward(inputs[1])
        ctx.state = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (state,) = ctx.saved_tensors
        if not torch.equal(state, ctx.state):
            raise RuntimeError(
                "activation checkpointing ran the layer again with other random numbers, so that "
                "other blocks were chosen. Leave generator out (torch's default generators are "
                "rewound), leave preserve_rng_state at True, or do not checkpoint this layer."
            )
        return grad, None


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
