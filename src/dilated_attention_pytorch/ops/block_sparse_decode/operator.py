"""The decode kernels as a PyTorch operator: functional and traceable."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_decode import triton_launch as launch
from dilated_attention_pytorch.ops.block_sparse_decode.arguments import DecodeArguments

NAMESPACE = "dilated_attention_pytorch"


def triton_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_decode` defines them."""
    n = args.query.shape[1]
    out, lse = decode_op(
        _rows(args.query),
        _rows(args.key),
        _rows(args.value),
        args.counts.expand(-1, -1, n),
        _rows(args.indices).expand(-1, -1, n, -1),
        None if args.block_bias is None else _rows(args.block_bias).expand(-1, -1, n, -1),
        args.lengths,
        args.starts,
        args.block_size,
        args.scale,
    )
    return out, lse


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous, which is all that the kernels ask for."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_decode", mutates_args=())
def decode_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_bias: Tensor | None,
    lengths: Tensor,
    starts: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    call = launch.Call(
        query, key, value, kv_num_blocks, kv_indices, block_bias, lengths, starts, block_size,
        scale,
    )  # fmt: skip
    out, lse = _empty_results(query)
    launch.launch_decode(call, out, lse)
    return out, lse


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    b, n, h, d = query.shape
    return query.new_empty(b, n, h, d), query.new_empty(b, h, n, dtype=torch.float32)


@decode_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_bias: Tensor | None,
    lengths: Tensor,
    starts: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _empty_results(query)
