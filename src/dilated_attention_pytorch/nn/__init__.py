"""Layers."""

from dilated_attention_pytorch.nn.adaptive import (
    BlockSparseAdaptive,
    NothingToChooseWarning,
    create_adaptive_block_sparse,
)
from dilated_attention_pytorch.nn.baselines import BlockSparseFixed, fixed_pattern
from dilated_attention_pytorch.nn.multihead import MultiheadAdaptiveAttention
from dilated_attention_pytorch.nn.state import SelectorState

__all__ = [
    "BlockSparseAdaptive",
    "BlockSparseFixed",
    "MultiheadAdaptiveAttention",
    "NothingToChooseWarning",
    "SelectorState",
    "create_adaptive_block_sparse",
    "fixed_pattern",
]
