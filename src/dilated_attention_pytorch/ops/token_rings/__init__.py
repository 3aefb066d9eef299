"""Rings of the latest queries and keys of a sequence."""

from dilated_attention_pytorch.ops.token_rings.interface import append_tokens

__all__ = ["append_tokens"]
