"""Block summaries: what the scorer sees of a block of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dilated_attention_pytorch.config import POOLINGS
from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.runtime import FLOATS, check_booleans, check_floating


def block_summaries(
    x: Tensor,
    block_size: int = 64,
    *,
    pooling: Sequence[str] = ("mean", "max"),
    valid: Tensor | None = None,
    pool_query: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Summarises each block of tokens by one vector per head.

    Mean pooling alone dilutes a single important token by the block size; max keeps it.

    Args:
        x: ``(batch, seq_len, num_heads, head_dim)``.
        block_size: Tokens per block; the last block may be partial.
        pooling: Poolings to concatenate, from ``"mean"``, ``"max"``, ``"min"`` and ``"attention"``
            (a learned query weighs the tokens: ``softmax_t(x_t · u) x_t``).
        valid: ``(1 or batch, seq_len)`` booleans; other tokens are left out. None: all count.
        pool_query: u of attention pooling, ``(num_heads, head_dim)``.
        dtype: Of the summaries; None: that of ``x``. Half precision is pooled in float32 in any
            case.

    Returns:
        ``(batch, blocks, num_heads, head_dim * len(pooling))``. A block without valid tokens gives
        zeros.

    Raises:
        TypeError: If ``pooling`` is one name instead of a sequence, ``x``, ``pool_query`` or
            ``dtype`` is not floating point, or ``valid`` not boolean.
        ValueError: If a pooling is unknown, ``"attention"`` comes without ``pool_query``,
            ``block_size`` is not positive, or ``x`` has other dimensions.

    Example:
        >>> import torch
        >>> block_summaries(torch.randn(2, 100, 4, 8), 64).shape
        torch.Size([2, 2, 4, 16])
    """
    if isinstance(pooling, str):
        raise TypeError(f"pooling must be a sequence of names, got {pooling!r}: ({pooling!r},).")
    check_floating("x", x)
    if pool_query is not None:
        check_floating("pool_query", pool_query)
    if valid is not None:
        check_booleans("valid", valid)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {FLOATS} or None, got {dtype}.")
    if x.dim() != 4:
        raise ValueError(
            f"x must have shape (batch, seq_len, num_heads, head_dim), got {tuple(x.shape)}."
        )
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}.")
    unknown = [name for name in pooling if name not in POOLINGS]
    if unknown or not pooling:
        raise ValueError(f"pooling must name one or more of {POOLINGS}, got {tuple(pooling)}.")
    if "attention" in pooling and pool_query is None:
        raise ValueError("pooling 'attention' needs pool_query (num_heads, head_dim), got None.")
    dtype = x.dtype if dtype is None else dtype
    batch, length, heads, dim = x.shape
    blocks = ceil_div(length, block_size)
    pad = blocks * block_size - length
    if pad:
        if valid is None:
            valid = torch.ones(1, length, dtype=torch.bool, device=x.device)
        x, valid = F.pad(x, (0, 0, 0, 0, 0, pad)), F.pad(valid, (0, pad))
    x = (
        x.view(batch, blocks, block_size, heads, dim)
        if x.is_contiguous()
        else x.reshape(batch, blocks, block_size, heads, dim)
    )
    keep = None
    if valid is not None:
        keep = valid.view(valid.shape[0], blocks, block_size, 1, 1)
    if keep is None and "attention" not in pooling:
        pooled: Tensor = _Pooled.apply(x, tuple(pooling), dtype)
        return pooled
    out = [_pool(x, name, keep, pool_query, dtype) for name in pooling]
    return out[0] if len(out) == 1 else torch.cat(out, -1)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What selection computes in: float32 for half precision, otherwise ``dtype`` itself.

    Rounded to half precision, summaries and scores would tie, and the fused kernels, which round
    neither, would choose other blocks than PyTorch or a step of generation.
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _Pooled(torch.autograd.Function):
    """Several poolings of whole blocks ``(b, i, t, h, d)`` whose gradient is written once.

    Autograd would make several tensors as large as the tokens for each pooling, which took longer
    than the summaries themselves. Of tokens that share a maximum the first takes the gradient.
    """

    @staticmethod
    def forward(x: Tensor, pooling: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        return torch.cat([_pool(x, name, None, None, dtype) for name in pooling], -1)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, tuple[str, ...], torch.dtype], output: Tensor
    ) -> None:
        x, ctx.pooling, _ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        parts = dict(zip(ctx.pooling, grad.unsqueeze(2).chunk(len(ctx.pooling), -1), strict=True))
        out.copy_(parts["mean"] / x.shape[2]) if "mean" in parts else out.zero_()
        for name, reduce in (("max", torch.max), ("min", torch.min)):
            if name in parts:
                place = reduce(x, 2, keepdim=True).indices
                # Each place comes once, so adding there is deterministic.
                out.scatter_(2, place, (out.gather(2, place) + parts[name]).to(out.dtype))
        return out, None, None


def _pool(
    x: Tensor, name: str, keep: Tensor | None, pool_query: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Pools ``(b, i, t, h, d)`` over t; tokens outside ``keep`` are left out."""
    wide = exact_dtype(x.dtype)
    if name == "mean":
        if keep is None:
            return x.mean(2, dtype=wide).to(dtype)
        total = torch.where(keep, x, 0).sum(2, dtype=wide)
        return (total / keep.sum(2).clamp(min=1)).to(dtype)
    if name in ("max", "min"):
        reduce, worst = (torch.amax, -torch.inf) if name == "max" else (torch.amin, torch.inf)
        if keep is None:
            return reduce(x, 2).to(dtype)
        pooled = reduce(torch.where(keep, x, worst), 2)
        return torch.where(keep.any(2), pooled, 0).to(dtype)
    if pool_query is None:
        raise ValueError("pooling 'attention' needs pool_query (num_heads, head_dim), got None.")
    if keep is not None:
        # Before the product: its gradient multiplies what lies there by 0, and 0 * NaN is NaN.
        x = torch.where(keep, x, 0)
    logits = torch.einsum("bithd,hd->bith", x.to(wide), pool_query.to(wide))[..., None]
    if keep is not None:
        # Not -inf: the softmax of a block without valid tokens must stay finite.
        logits = torch.where(keep, logits, torch.finfo(wide).min)
    return (logits.softmax(2) * x).sum(2).to(dtype)


def past_windows(
    x: Tensor, block_size: int, valid: Tensor | None, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Re-cuts tokens so that block i holds the window that ends with block i's first token.

    With ``block_size=4`` block 1 holds tokens 1 to 4 instead of 4 to 7: nothing later than the
    first token of the block that it stands for.

    Args:
        x: ``(batch, seq_len, heads, dim)``.
        block_size: Tokens per block.
        valid: ``(1 or batch, seq_len)`` booleans or None.
        document_ids: ``(batch, seq_len)``: tokens of a document other than that of the block's
            first token are left out. None: one document.

    Returns:
        The re-cut tokens ``(batch, blocks * block_size, heads, dim)`` and their validity.
    """
    length = x.shape[1]
    blocks = ceil_div(length, block_size)
    total = blocks * block_size
    left = block_size - 1
    if valid is None:
        valid = torch.ones(1, length, dtype=torch.bool, device=x.device)
    x = F.pad(x, (0, 0, 0, 0, left, 0))[:, :total]
    valid = F.pad(valid, (left, 0))[:, :total]
    if document_ids is not None:
        first = document_ids[:, ::block_size].repeat_interleave(block_size, 1)
        window = F.pad(document_ids, (left, 0), value=-1)[:, :total]
        valid = valid & (window == first) & (window >= 0)
    return x, valid
