"""Sparse attention for pretrained models of Hugging Face transformers; needs the extra ``[hf]``."""

from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel, adapt
from dilated_attention_pytorch.integrations.transformers.adapter import (
    AdapterError,
    AdapterWarning,
    SelectorAdapter,
    load_adapter,
    save_adapter,
)
from dilated_attention_pytorch.integrations.transformers.families import FAMILIES
from dilated_attention_pytorch.integrations.transformers.fit import fit_low_rank
from dilated_attention_pytorch.integrations.transformers.mask import plain_mask
from dilated_attention_pytorch.integrations.transformers.register import register

__all__ = [
    "FAMILIES",
    "AdaptedModel",
    "AdapterError",
    "AdapterWarning",
    "SelectorAdapter",
    "adapt",
    "fit_low_rank",
    "load_adapter",
    "plain_mask",
    "register",
    "save_adapter",
]
