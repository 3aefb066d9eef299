"""Notices that activation checkpointing drew other random numbers when it ran a layer again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class ReplayGuard:
    """Compares the state of a generator between a forward pass and its recomputation.

    ``torch.utils.checkpoint`` rewinds the default generators before it runs a function again, but
    knows of no other: the second run would choose other blocks than the output was computed from,
    and the gradients would be wrong without a word.

    Args:
        generator: What the layer draws from; its state is taken now.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator, self._before = generator, generator.get_state()

    def watch(self, out: Tensor) -> Tensor:
        """Passes ``out`` on; its backward pass raises RuntimeError if the states differ.

        With ``use_reentrant=True`` the first run records no graph, so that nothing can be compared.
        """
        drew = not torch.equal(self._before, self._generator.get_state())
        if not drew or not out.requires_grad:
            return out
        watched: Tensor = _Watch.apply(out, self._before)
        return watched


class _Watch(Function):
    @staticmethod
    def forward(out: Tensor, state: Tensor) -> Tensor:
        return out.view_as(out)

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
                "generator had moved on when activation checkpointing ran the layer again, so that "
                "other blocks were chosen. Leave generator out (torch's default generators are "
                "rewound), or do not checkpoint this layer."
            )
        return grad, None
