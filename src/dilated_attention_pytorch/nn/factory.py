"""Builds an adaptive layer from a model's dimension."""

from __future__ import annotations

from collections.abc import Sequence

from dilated_attention_pytorch.config import AdaptiveConfig, as_int
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


def create_adaptive_block_sparse(
    embed_dim: int,
    num_heads: int,
    segment_lengths: Sequence[int] | None = (2048, 4096, 8192),
    dilation_rates: Sequence[int] | None = (1, 2, 4),
    adaptive_config: AdaptiveConfig | None = None,
    *,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> BlockSparseAdaptive:
    """Builds a :class:`BlockSparseAdaptive` for a model dimension.

    Args:
        embed_dim: Model dimension; ``head_dim = embed_dim // num_heads``.
        num_heads: Query heads; must divide ``embed_dim``.
        segment_lengths: As in the class; None: choose from all blocks.
        dilation_rates: As in the class.
        adaptive_config: As in the class.
        num_kv_heads: As in the class.
        scale: As in the class.
        backend: As in the class.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dim``.

    Example:
        >>> layer = create_adaptive_block_sparse(embed_dim=768, num_heads=12)
        >>> layer.head_dim
        64
    """
    embed_dim, num_heads = as_int("embed_dim", embed_dim), as_int("num_heads", num_heads)
    if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"num_heads must divide embed_dim, got num_heads={num_heads}, embed_dim={embed_dim}."
        )
    return BlockSparseAdaptive(
        segment_lengths,
        dilation_rates,
        num_heads,
        embed_dim // num_heads,
        adaptive_config,
        num_kv_heads=num_kv_heads,
        scale=scale,
        backend=backend,
    )
