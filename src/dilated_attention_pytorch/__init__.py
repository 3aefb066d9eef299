"""Attention whose connections are chosen from the content, block by block, and learned."""

from dilated_attention_pytorch.ops.block_sparse_attention import (
    block_sparse_attention,
    explain_backend,
)
from dilated_attention_pytorch.pattern import BlockPattern

__all__ = ["BlockPattern", "block_sparse_attention", "explain_backend"]
