"""What registered operators share: namespace, layout, where Triton runs, derivatives."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

NAMESPACE = "dilated_attention_pytorch"

# Looked up once: torch.compile cannot trace it.
HAS_TRITON = importlib.util.find_spec("triton") is not None

Apply = Callable[..., Any]


def rows_of(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous, which is all that the kernels ask for."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_results(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Room for the output ``(b, n, h, d)`` and the lse; the fake of operators that give both."""
    b, n, h, d = query.shape
    return query.new_empty(b, n, h, d), query.new_empty(b, h, n, dtype=torch.float32)


def triton_missing_reason(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device, or None if they can."""
    if not HAS_TRITON:
        return "the triton package is not installed"
    if device.type != "cuda" and not _interpreting():
        return f"they need a CUDA device (or TRITON_INTERPRET=1), got {device.type}"
    return None


def _interpreting() -> bool:
    # Triton is imported on first use: the package itself needs torch alone.
    from dilated_attention_pytorch.ops.triton_device import INTERPRETED

    return INTERPRETED


def differentiable(
    forward_op: Any,
    backward_op: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
) -> Apply:
    """Ties two operators together; the gradient has none of its own.

    Args:
        forward_op: A ``torch.library.custom_op``. Takes tensors with the batch first, or None, and
            plain numbers.
        backward_op: Another one; called by ``backward``.
        setup_context: As ``register_autograd`` takes it.
        backward: ``backward(run, ctx, *grads)``, where ``run`` stands for ``backward_op``.

    Returns:
        What to call in the place of ``forward_op``. PyTorch's own wrapper around an operator's
        gradient refuses ``torch.func``, so that an autograd function takes its place there.
    """
    backward_op.register_autograd(_refuse_second_derivative)
    forward_op.register_autograd(
        lambda ctx, *grads: backward(backward_op, ctx, *grads), setup_context=setup_context
    )

    class Backward(Function):
        forward = staticmethod(backward_op)
        backward = staticmethod(_refuse_second_derivative)
        jvp = staticmethod(_refuse_forward_mode)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Keeps nothing."""

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            return _fold_into_batch(Backward.apply, info.batch_size, in_dims, args)

    class Forward(Function):
        forward = staticmethod(forward_op)
        jvp = staticmethod(_refuse_forward_mode)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return backward(Backward.apply, ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            return _fold_into_batch(Forward.apply, info.batch_size, in_dims, args)

    def apply(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():
                return Forward.apply(*args)
            if any(_has_tangent(x) for x in args):
                _refuse_forward_mode(None)
        return forward_op(*args)

    return apply


def _fold_into_batch(
    op: Apply, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Runs a mapped call as one with ``size`` times the batch."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    # Numbers that are not tensors have no dimension.
    results = op(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
    # A result that was not asked for is empty and has no batch.
    unfolded = tuple(
        x.unflatten(0, (size, -1)) if x.dim() > 1 else x.expand(size, *x.shape) for x in results
    )
    return unfolded, (0,) * len(unfolded)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError(
        "block_sparse_attention has no second derivative in this backend; leave out create_graph, "
        "or use backend='reference', which is dense."
    )


def _has_tangent(x: Any) -> bool:
    """Whether forward mode is at work, whose tangents an operator would drop without a word."""
    if not isinstance(x, Tensor):
        return False
    return torch.autograd.forward_ad.unpack_dual(x, level=0).tangent is not None


def _refuse_forward_mode(ctx: Any, *tangents: Any) -> NoReturn:
    raise NotImplementedError(
        "block_sparse_attention has no forward-mode derivative in this backend; use reverse mode "
        "(backward, torch.func.grad, torch.func.vjp), or backend='reference', which is dense."
    )
