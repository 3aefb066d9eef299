"""Decoding of :class:`BlockSparseAdaptive`: choosing blocks by remembered summaries.

Everything that a choice needs is recomputed from the state alone, so that choosing twice for a row
gives the same list: samples of different lengths choose together, whoever begins a block or not.
"""

from dilated_attention_pytorch.nn.decoding.prompt import remember
from dilated_attention_pytorch.nn.decoding.settings import decoding_refusal
from dilated_attention_pytorch.nn.decoding.steps import decode

__all__ = ["decode", "decoding_refusal", "remember"]
