"""Makes the attention known to transformers; nothing happens on import."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from dilated_attention_pytorch.integrations.transformers.attention import block_sparse_forward
from dilated_attention_pytorch.integrations.transformers.mask import compact_mask

# transformers gives names with "flash" or "/" a meaning of their own.
ATTENTION_NAME = "dilated_block_sparse"


def register() -> str:
    """Registers attention and mask function under one name; calling it again changes nothing.

    Without the mask function models would pass no mask, and padding would be ignored.

    Returns:
        The name, for ``model.set_attn_implementation``. A model without selectors then runs
        PyTorch's attention; :func:`adapt` does both.

    Example:
        >>> register()
        'dilated_block_sparse'
    """
    AttentionInterface.register(ATTENTION_NAME, block_sparse_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, compact_mask)
    return ATTENTION_NAME
