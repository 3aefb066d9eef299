"""The dense backend: PyTorch's own attention, for patterns that leave nothing out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments


def dense_attention(args: Arguments) -> tuple[Tensor, None]:
    """Computes the output as :func:`block_sparse_attention` defines it; there is no lse.

    On a GPU its gradients may differ in the last bits from run to run, unless
    ``torch.use_deterministic_algorithms(True)`` asks for others.
    """
    query, key, value = (x.transpose(1, 2) for x in (args.query, args.key, args.value))
    group = query.shape[1] // key.shape[1]
    if group > 1:
        # Spelled out: with enable_gqa some devices fall back to forming all the weights.
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(query, key, value, scale=args.scale)
    return out.transpose(1, 2), None


def dense_unsupported_reason(args: Arguments, return_lse: bool) -> str | None:
    """Why dense attention cannot stand in for the pattern, or None if it can.

    Looks at what is known without reading the pattern, so that nothing waits for a device.
    """
    mask, known = args.mask, args.pattern.complete_for
    if args.block_bias is not None:
        return "it adds no block_bias"
    if args.mass_probe is not None:
        return "it returns no tile mass"
    if return_lse:
        return "it returns no lse"
    if mask.per_sample:
        return "it knows no key_lengths, cu_seqlens and query_offset per sample"
    if known is None:
        return "the pattern is not known to keep every tile"
    if mask.q_len == 0 or mask.kv_len == 0:
        return "there is nothing to attend to"
    if mask.causal and not _sees_everything(args):
        # PyTorch multiplies later tokens by 0, so that one that is not finite spoils earlier ones;
        # with a scale of 0 or below -inf in its mask becomes NaN.
        return "a causal mask hides tokens, whose values must not matter"
    if known.causal and not _sees_everything(args):
        return "the pattern keeps every tile of a causal mask alone"
    return None


def _sees_everything(args: Arguments) -> bool:
    """Whether the causal mask hides nothing; for masks with one offset."""
    offset = args.mask.query_offset
    return not isinstance(offset, Tensor) and offset >= args.mask.kv_len - 1
