"""Attention of new tokens over the kept blocks of a KV cache."""

from dilated_attention_pytorch.ops.block_sparse_decode.interface import (
    BACKENDS,
    block_sparse_decode,
)

__all__ = ["BACKENDS", "block_sparse_decode"]
