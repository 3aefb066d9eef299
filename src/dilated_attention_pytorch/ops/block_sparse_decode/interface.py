"""The public op: checks its arguments, picks a backend, calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_decode.arguments import (
    DecodeArguments,
    check_arguments,
    check_values,
)
from dilated_attention_pytorch.ops.block_sparse_decode.gather import gather_decode
from dilated_attention_pytorch.ops.block_sparse_decode.reference import reference_decode
from dilated_attention_pytorch.ops.operators import triton_missing_reason

Backend = Callable[[DecodeArguments], tuple[Tensor, Tensor]]


def _triton_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    # Triton is imported on first use: the package itself needs torch alone.
    from dilated_attention_pytorch.ops.block_sparse_decode.triton_decode import triton_decode

    return triton_decode(args)


BACKENDS: dict[str, Backend] = {
    "reference": reference_decode,
    "gather": gather_decode,
    "triton": _triton_decode,
}


def block_sparse_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
    block_bias: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal attention of the newest tokens over kept blocks of a KV cache.

    The last n of a sample's ``lengths`` tokens ask; each reads the tokens up to its own position
    that lie in the blocks of its list::

        cache   . . a b c d e f g h - -      starts 2, lengths 8, block_size 4
        block       0 0 0 0 1 1 1 1          n = 2: queries are g and h

    It is :func:`block_sparse_attention` with ``causal=True`` for query blocks of one token, laid
    out for a cache that somebody else owns. What lies outside the kept blocks, before ``starts``
    and from the end on is never read. No gradient; nothing waits for the device.

    Args:
        query: ``(batch, n, num_heads, head_dim)``; any n, made for a few.
        key_cache: ``(batch, capacity, num_kv_heads, head_dim)``, the new tokens included. Any
            strides; the last dimension should be contiguous.
        value_cache: Shaped like ``key_cache``.
        kv_num_blocks: ``(batch, heads, n)`` int32, blocks that each token reads; ``heads`` is 1,
            ``num_kv_heads`` or ``num_heads``. ``(batch, heads, 1)``: the same for all tokens.
        kv_indices: ``(batch, heads, n, k)`` int32, their numbers, ascending and
            left-packed; entries from ``kv_num_blocks`` on are ignored. On the CPU lists, lengths
            and starts are checked by value; on a GPU entries that name no block are left out,
            counts end at k, and a block that is listed twice counts twice.
        lengths: ``(batch,)`` integers: tokens of each sample in the cache, the new ones included.
            None: the capacity.
        starts: ``(batch,)`` integers: cache position of token 0 (left padding). None: 0.
        block_size: Tokens per block, counted from token 0.
        scale: Factor of the logits. None: ``head_dim ** -0.5``.
        block_bias: Shaped like ``kv_indices``: added to every logit of a block; a block with -inf
            is not read. None: 0.
        backend: ``"auto"`` (``"triton"`` on CUDA, ``"gather"`` elsewhere) or a name in
            ``BACKENDS``.
        return_lse: Also return the log-sum-exp of the logits.

    Returns:
        The output, shaped and typed like ``query``; with ``return_lse`` also ``(batch, num_heads,
        n)`` in float32 (float64 for float64). A token with nothing to read returns 0 and -inf.

    Raises:
        TypeError: If inputs are not floating point, mix dtypes, or lists are not integers.
        ValueError: If shapes or devices disagree, an input needs a gradient, the backend is
            unknown or cannot run this, or (on the CPU) a list, length or start is out of range.

    Example:
        >>> import torch
        >>> cache = torch.randn(1, 256, 2, 16)
        >>> blocks = torch.tensor([0, 3]).int().view(1, 1, 1, 2)
        >>> count = torch.full((1, 1, 1), 2).int()
        >>> block_sparse_decode(torch.randn(1, 1, 4, 16), cache, cache, count, blocks).shape
        torch.Size([1, 1, 4, 16])
    """
    arguments = check_arguments(
        query, key_cache, value_cache, kv_num_blocks, kv_indices, lengths=lengths, starts=starts,
        block_size=block_size, scale=scale, block_bias=block_bias,
    )  # fmt: skip
    check_values(arguments)
    out, lse = run_decode(arguments, backend)
    return (out, lse) if return_lse else out


def run_decode(arguments: DecodeArguments, backend: str) -> tuple[Tensor, Tensor]:
    """Output and lse of checked arguments; see :func:`block_sparse_decode`."""
    return BACKENDS[choose_backend(arguments, backend)](arguments)


def choose_backend(arguments: DecodeArguments, backend: str) -> str:
    """Picks the backend.

    Raises:
        ValueError: If ``backend`` is unknown, or named and unable to take these arguments.
    """
    if backend == "auto":
        on_gpu = arguments.query.device.type == "cuda"
        return "triton" if on_gpu and triton_unsupported_reason(arguments) is None else "gather"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}.")
    reason = triton_unsupported_reason(arguments) if backend == "triton" else None
    if reason:
        raise ValueError(f"backend={backend!r} cannot run this: {reason}; use backend='auto'.")
    return backend


_TRITON_BLOCK_SIZES = (16, 32, 64, 128)
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_unsupported_reason(arguments: DecodeArguments) -> str | None:
    """Why the Triton kernels cannot run this, or None if they can."""
    query = arguments.query
    if query.dtype not in _TRITON_DTYPES:
        return f"they compute bfloat16, float16 and float32, not {query.dtype}"
    if arguments.block_size not in _TRITON_BLOCK_SIZES:
        return f"block_size must be among {_TRITON_BLOCK_SIZES}, got {arguments.block_size}"
    if query.shape[3] > 256:
        return f"head_dim must be at most 256, got {query.shape[3]}"
    return triton_missing_reason(query.device)
