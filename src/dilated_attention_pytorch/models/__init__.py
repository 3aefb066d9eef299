"""Small models for the command line and the experiments."""

from dilated_attention_pytorch.models.transformer import (
    ATTENTION_NAMES,
    DenseAttention,
    Transformer,
    build_attention,
)

__all__ = ["ATTENTION_NAMES", "DenseAttention", "Transformer", "build_attention"]
