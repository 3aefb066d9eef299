"""Attention over the tiles of a BlockPattern, with gradients for whoever chose them."""

from dilated_attention_pytorch.ops.block_sparse_attention.interface import (
    BACKENDS,
    block_sparse_attention,
    explain_backend,
)

__all__ = ["BACKENDS", "block_sparse_attention", "explain_backend"]
