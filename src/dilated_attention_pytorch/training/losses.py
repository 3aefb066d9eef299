"""Losses that train the selection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


def get_sparsity_loss(model: nn.Module) -> Tensor:
    """Mean of :meth:`BlockSparseAdaptive.get_sparsity_loss` over the layers of a model.

    Raises:
        RuntimeError: If a layer has run no forward pass.
        ValueError: If the model holds no adaptive layer.

    Example:
        >>> import torch
        >>> model = nn.ModuleList([BlockSparseAdaptive(num_heads=2, head_dim=16)])
        >>> x = torch.randn(1, 512, 2, 16)
        >>> loss = model[0](x, x, x).square().mean() + 0.01 * get_sparsity_loss(model)
        >>> loss.requires_grad
        True
    """
    losses = [m.get_sparsity_loss() for m in model.modules() if isinstance(m, BlockSparseAdaptive)]
    if not losses:
        raise ValueError("model holds no BlockSparseAdaptive layer.")
    return torch.stack(losses).mean()
