"""Layers."""

from dilated_attention_pytorch.nn.adaptive import (
    BlockSparseAdaptive,
    create_adaptive_block_sparse,
    get_sparsity_loss,
)
from dilated_attention_pytorch.nn.fixed import BlockSparseFixed, fixed_pattern

__all__ = [
    "BlockSparseAdaptive",
    "BlockSparseFixed",
    "create_adaptive_block_sparse",
    "fixed_pattern",
    "get_sparsity_loss",
]
