"""The compiled CPU kernel as an operator; its gradients are those of the PyTorch path."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import document_bounds
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments
from dilated_attention_pytorch.ops.block_sparse_attention.cpp_build import build_failure, library
from dilated_attention_pytorch.ops.block_sparse_attention.gather import (
    backward,
    backward_op,
    flatten,
    setup_context,
    unflatten,
)
from dilated_attention_pytorch.ops.operators import (
    NAMESPACE,
    differentiable,
    empty_results,
    rows_of,
)

# Logits of dense attention from which on `auto` takes the kernel. Below, the first call would wait
# for a compiler to save a few milliseconds.
AUTO_LOGITS = 1 << 25


def cpp_attention(args: Arguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_attention` defines them."""
    out, lse = _attend(*flatten(args))
    return out, lse


def cpp_unsupported_reason(args: Arguments) -> str | None:
    """Why the compiled kernel cannot run this, or None if it can; builds it if need be."""
    if args.query.device.type != "cpu":
        return f"it runs on the CPU, not on {args.query.device.type}"
    if args.query.dtype != torch.float32:
        return f"it computes float32, not {args.query.dtype}"
    # What is traced cannot start a compiler; the operator does when it runs.
    return None if torch.compiler.is_compiling() else build_failure()


def auto_unsupported_reason(args: Arguments) -> str | None:
    """Why ``auto`` leaves a call to others that the kernel may be able to run, or None."""
    if torch.compiler.is_compiling():
        return "a traced program may run where there is no compiler"
    (b, n, h, _), m = args.query.shape, args.key.shape[1]
    if b * n * h * m < AUTO_LOGITS:
        return f"a compiled kernel pays from {AUTO_LOGITS:,} dense logits on"
    return cpp_unsupported_reason(args)


@torch.library.custom_op(f"{NAMESPACE}::cpp_forward", mutates_args=())
def forward_op(
    query: Tensor, key: Tensor, value: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor,
    block_bias: Tensor | None, mass_probe: Tensor | None, key_lengths: Tensor | None,
    query_offset: Tensor | None, document_ids: Tensor | None, block_q: int, block_k: int,
    causal: bool, offset: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse; ``mass_probe`` matters to the gradient alone."""
    out, lse = empty_results(query)
    _run(
        unflatten(
            query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
            document_ids, block_q, block_k, causal, offset, scale,
        ), out, lse,
    )  # fmt: skip
    return out, lse


forward_op.register_fake(empty_results)
_attend = differentiable(forward_op, backward_op, setup_context, backward)

_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64


class _Problem(ctypes.Structure):
    """``Problem`` of ``cpp_forward.cpp``, field by field."""

    _fields_ = (
        *((name, _Pointer) for name in (
            "query", "key", "value", "counts", "indices", "bias", "offsets", "lengths", "starts",
            "ends", "out", "lse",
        )),
        *((name, _Number * 3) for name in ("query_step", "key_step", "value_step", "count_step")),
        *((name, _Number * 4) for name in ("index_step", "bias_step")),
        *((name, _Number) for name in (
            "batch", "queries", "keys", "heads", "kv_heads", "pattern_heads", "head_dim", "width",
            "block_q", "block_k", "causal", "offset", "threads",
        )),
        ("scale", ctypes.c_double),
    )  # fmt: skip


def _run(args: Arguments, out: Tensor, lse: Tensor) -> None:
    """Fills ``out`` and ``lse``."""
    query, key, value = (rows_of(x) for x in (args.query, args.key, args.value))
    pattern, mask, bias = args.pattern, args.mask, args.block_bias
    per_sample = isinstance(mask.query_offset, Tensor)
    starts = ends = None
    if mask.document_ids is not None:
        starts, ends = document_bounds(mask.document_ids)
        # Padding sees nothing.
        ends = torch.where(mask.document_ids >= 0, ends, starts)
    # In the order of the fields; the tuple keeps what is made here alive during the call.
    tensors = (
        query, key, value, pattern.kv_num_blocks, pattern.kv_indices, bias,
        _integers(mask.query_offset), _integers(mask.key_lengths), _integers(starts),
        _integers(ends), out, lse,
    )  # fmt: skip
    (b, n, h, d), (m, g) = query.shape, key.shape[1:3]
    problem = _Problem(
        *(None if x is None else x.data_ptr() for x in tensors),
        query.stride()[:3], key.stride()[:3], value.stride()[:3], pattern.kv_num_blocks.stride(),
        pattern.kv_indices.stride(), (0,) * 4 if bias is None else bias.stride(),
        b, n, m, h, g, pattern.num_heads, d, pattern.kv_indices.shape[3], *pattern.block_size,
        mask.causal, 0 if per_sample else mask.query_offset, torch.get_num_threads(), args.scale,
    )  # fmt: skip
    status = library().block_sparse_forward(ctypes.byref(problem))
    if status == 1:
        raise ValueError(
            "pattern lists a key block that is not there (kv_num_blocks or kv_indices out of "
            "range); BlockPattern.validate() names it."
        )
    if status:
        raise MemoryError("The compiled CPU kernel found no memory for its buffers.")


def _integers(x: int | Tensor | None) -> Tensor | None:
    """Contiguous int64, of tensors alone."""
    return x.long().contiguous() if isinstance(x, Tensor) else None
