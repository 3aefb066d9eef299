"""The public decode op: its oracle, the PyTorch path, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention.arguments import readable
from dilated_attention_pytorch.ops.block_sparse_attention.gather import (
    all_finite,
    rows_and_steps,
    weighted_sum,
)
from dilated_attention_pytorch.ops.block_sparse_attention.reference import (
    pair_products,
    visible_sum,
)
from dilated_attention_pytorch.ops.block_sparse_decode.arguments import (
    DecodeArguments,
    check_arguments,
    check_values,
)
from dilated_attention_pytorch.ops.operators import triton_missing_reason


def reference_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_decode` defines them."""
    dtype = torch.float64 if args.query.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (args.query, args.key, args.value))
    batch, heads, n, _ = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    # Token number of each place in the cache, ``(b, 1, 1, m)``.
    token = torch.arange(k.shape[2], device=q.device).view(1, 1, 1, -1)
    if args.starts is not None:
        token = token - args.starts.long().view(-1, 1, 1, 1)
    visible = (token >= 0) & (token < args.limits()[:, None, :, None])
    block = token.clamp(min=0) // args.block_size
    kept = torch.zeros_like(visible).expand(batch, args.counts.shape[1], n, -1).clone()
    bias = torch.zeros(kept.shape, dtype=dtype, device=q.device)
    listed = args.listed()
    for slot in range(args.indices.shape[-1]):
        here = (block == args.indices[..., slot, None]) & listed[..., slot, None]
        kept |= here
        if args.block_bias is not None:
            bias = torch.where(here, args.block_bias[..., slot, None], bias)
    kept, bias = (x.repeat_interleave(heads // x.shape[1], 1) for x in (kept, bias))
    visible = visible & kept
    logits = torch.where(visible, pair_products(q, k, visible) * args.scale + bias, -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    visible = visible & ~empty
    lse = logits.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
    p = torch.where(visible, (logits - lse).exp(), 0)
    out = visible_sum(p, v, visible)
    lse = lse.masked_fill(empty, -torch.inf).squeeze(-1)
    return out.transpose(1, 2).to(args.query.dtype), lse


# Numbers of gathered keys at a time on the CPU: 2**18 float32 numbers are 1 MiB, so that the
# products read them from the processor's cache and main memory is read once.
_CHUNK_NUMBERS = {"cpu": 1 << 18}
_CHUNK_NUMBERS_ELSEWHERE = 1 << 26


def gather_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_decode` defines them.

    Does not wait for the device; lists shorter than the widest cost as much as the widest.
    """
    with torch.autocast(args.query.device.type, enabled=False):
        return _decode(args)


def _decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """One row per list and group: the query heads of its tokens that share keys and list."""
    batch, n, heads, dim = args.query.shape
    wide = torch.float64 if args.query.dtype == torch.float64 else torch.float32
    if 0 in (args.query.numel(), args.key.numel(), args.indices.numel()):
        nothing = args.query.new_full((batch, heads, n), -torch.inf, dtype=wide)
        return torch.zeros_like(args.query), nothing
    kv_heads, lists = args.key.shape[2], args.counts.shape[1]
    planes = max(kv_heads, lists)
    group, per_list = heads // planes, n // args.counts.shape[2]
    query = args.query.reshape(batch, n // per_list, per_list, planes, group, dim)
    query = query.permute(0, 3, 1, 2, 4, 5).to(wide) * args.scale
    index, visible = _tokens(args, planes)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:-1], dtype=wide, device=query.device)
    bias = None
    if args.block_bias is not None:
        bias = args.block_bias.repeat_interleave(args.block_size, -1)
        bias = bias.repeat_interleave(planes // lists, 1)
    limit = _CHUNK_NUMBERS.get(query.device.type, _CHUNK_NUMBERS_ELSEWHERE)
    step = min(max(limit // max(index.shape[2] * index.shape[3] * dim, 1), 1), planes)
    keys, values = _Rows(args.key), _Rows(args.value)
    head = torch.arange(planes, device=query.device) // (planes // kv_heads)
    for b in range(batch):
        for first in range(0, planes, step):
            part = slice(first, first + step)
            tokens = index[b, part]
            q = query[b, part]
            k = keys.take(b, head[part], tokens).to(wide)
            logits = (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, (per_list, group))
            if bias is not None:
                logits += bias[b, part, :, None, None]
            logits.masked_fill_(~visible[b, part, :, :, None], -torch.inf)
            high = logits.amax(-1, keepdim=True)
            empty = high == -torch.inf
            weights = logits.sub_(high.masked_fill_(empty, 0)).exp_()
            total = weights.sum(-1, keepdim=True)
            v = values.take(b, head[part], tokens).to(wide)
            x = _weighted_sum(weights, v, visible[b, part])
            # A row without tokens has weights of 0, but 0 * nan and 0 / 0 are nan.
            out[b, part] = (x / total).masked_fill(empty, 0)
            # An infinite logit takes all the weight: not inf - inf.
            of_rows = (total.log() + high).masked_fill(high == torch.inf, torch.inf)
            lse[b, part] = of_rows.squeeze(-1)
    # Planes and groups are the heads, lists and their tokens the tokens.
    out = out.permute(0, 2, 3, 1, 4, 5).reshape(args.query.shape)
    return out.to(args.query.dtype), lse.permute(0, 1, 4, 2, 3).reshape(batch, heads, n)


def _weighted_sum(weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """``(p, l, t, g, m)`` weights of ``(p, l, m, d)`` values, ``(p, l, t, g, d)``.

    Where looking costs no wait, values that are not finite reach those of the t queries alone that
    see them: a later one may see more than an earlier one.
    """
    rows = weights.flatten(0, 1).flatten(1, 2)
    x = rows.new_empty(*rows.shape[:2], v.shape[-1])
    hidden = None
    if weights.shape[2] > 1 and readable(v) and not all_finite(v):
        hidden = ~visible[:, :, :, None].expand(weights.shape).flatten(0, 1).flatten(1, 2)
    weighted_sum(rows, v.flatten(0, 1), hidden, x)
    return x.view(*weights.shape[:-1], -1)


def _tokens(args: DecodeArguments, planes: int) -> tuple[Tensor, Tensor]:
    """Cache positions of each list's tokens, and which of them each of its queries sees.

    Returns:
        ``(b, planes, l, k * block_size)`` for l lists, and booleans ``(b, planes, l, n / l, k *
        block_size)``.
    """
    size, lists = args.block_size, args.counts.shape[2]
    limits = args.limits().unflatten(1, (lists, -1))[:, None, :, :, None]
    inside = torch.arange(size, device=args.indices.device)
    token = (args.indices.long()[..., None] * size + inside).flatten(-2)
    listed = args.listed().repeat_interleave(size, -1)
    visible = listed[:, :, :, None] & (token[:, :, :, None] < limits)
    # What nobody sees repeats the first token that is seen. The last query sees all that those
    # before it see.
    seen = visible[:, :, :, -1]
    if token.shape[-1]:
        token = torch.where(seen, token, token.gather(-1, seen.int().argmax(-1, keepdim=True)))
    if args.starts is not None:
        token = token + args.starts.long().view(-1, 1, 1, 1)
    token = token.clamp(0, max(args.key.shape[1] - 1, 0))
    repeat = planes // token.shape[1]
    if repeat == 1:
        return token, visible
    return token.repeat_interleave(repeat, 1), visible.repeat_interleave(repeat, 1)


class _Rows:
    """A cache as rows of ``head_dim`` numbers, gathered without a copy of the cache."""

    def __init__(self, x: Tensor) -> None:
        self.rows, self.strides = rows_and_steps(x)

    def take(self, batch: int, heads: Tensor, tokens: Tensor) -> Tensor:
        """Tokens ``(p, n, t)`` of heads ``(p,)`` of one sample as ``(p, n, t, d)``."""
        base = heads * self.strides[2] + batch * self.strides[0]
        place = tokens * self.strides[1] + base[:, None, None]
        return self.rows.index_select(0, place.flatten()).view(*tokens.shape, -1)


Backend = Callable[[DecodeArguments], tuple[Tensor, Tensor]]


def _triton_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    # Triton is imported on first use: the package itself needs torch alone.
    from dilated_attention_pytorch.ops.block_sparse_decode.triton_decode import triton_decode

    return triton_decode(args)


BACKENDS: dict[str, Backend] = {
    "reference": reference_decode,
    "gather": gather_decode,
    "triton": _triton_decode,
}


def block_sparse_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
    block_bias: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal attention of the newest tokens over kept blocks of a KV cache.

    The last n of a sample's ``lengths`` tokens ask; each reads the tokens up to its own position
    that lie in the blocks of its list::

        cache   . . a b c d e f g h - -      starts 2, lengths 8, block_size 4
        block       0 0 0 0 1 1 1 1          n = 2: queries are g and h

    It is :func:`block_sparse_attention` with ``causal=True`` for query blocks of one token, laid
    out for a cache that somebody else owns. What lies outside the kept blocks, before ``starts``
    and from the end on is never read. No gradient; nothing waits for the device.

    Args:
        query: ``(batch, n, num_heads, head_dim)``; any n, made for a few.
        key_cache: ``(batch, capacity, num_kv_heads, head_dim)``, the new tokens included. Any
            strides; the last dimension should be contiguous.
        value_cache: Shaped like ``key_cache``.
        kv_num_blocks: ``(batch, heads, n)`` int32, blocks that each token reads; ``heads`` is 1,
            ``num_kv_heads`` or ``num_heads``. ``(batch, heads, 1)``: the same for all tokens.
        kv_indices: ``(batch, heads, n, k)`` int32, their numbers, ascending and
            left-packed; entries from ``kv_num_blocks`` on are ignored. On the CPU lists, lengths
            and starts are checked by value; on a GPU entries that name no block are left out,
            counts end at k, and a block that is listed twice counts twice.
        lengths: ``(batch,)`` integers: tokens of each sample in the cache, the new ones included.
            None: the capacity.
        starts: ``(batch,)`` integers: cache position of token 0 (left padding). None: 0.
        block_size: Tokens per block, counted from token 0.
        scale: Factor of the logits. None: ``head_dim ** -0.5``.
        block_bias: Shaped like ``kv_indices``: added to every logit of a block; a block with -inf
            is not read. None: 0.
        backend: ``"auto"`` (``"triton"`` on CUDA, ``"gather"`` elsewhere) or a name in
            ``BACKENDS``.
        return_lse: Also return the log-sum-exp of the logits.

    Returns:
        The output, shaped and typed like ``query``; with ``return_lse`` also ``(batch, num_heads,
        n)`` in float32 (float64 for float64). A token with nothing to read returns 0 and -inf.

    Raises:
        TypeError: If inputs are not floating point, mix dtypes, or lists are not integers.
        ValueError: If shapes or devices disagree, an input needs a gradient, the backend is
            unknown or cannot run this, or (on the CPU) a list, length or start is out of range.

    Example:
        >>> import torch
        >>> cache = torch.randn(1, 256, 2, 16)
        >>> blocks = torch.tensor([0, 3]).int().view(1, 1, 1, 2)
        >>> count = torch.full((1, 1, 1), 2).int()
        >>> block_sparse_decode(torch.randn(1, 1, 4, 16), cache, cache, count, blocks).shape
        torch.Size([1, 1, 4, 16])
    """
    arguments = check_arguments(
        query, key_cache, value_cache, kv_num_blocks, kv_indices, lengths=lengths, starts=starts,
        block_size=block_size, scale=scale, block_bias=block_bias,
    )  # fmt: skip
    check_values(arguments)
    out, lse = run_decode(arguments, backend)
    return (out, lse) if return_lse else out


def run_decode(arguments: DecodeArguments, backend: str) -> tuple[Tensor, Tensor]:
    """Output and lse of checked arguments; see :func:`block_sparse_decode`."""
    return BACKENDS[choose_backend(arguments, backend)](arguments)


def choose_backend(arguments: DecodeArguments, backend: str) -> str:
    """Picks the backend.

    Raises:
        ValueError: If ``backend`` is unknown, or named and unable to take these arguments.
    """
    if backend == "auto":
        on_gpu = arguments.query.device.type == "cuda"
        return "triton" if on_gpu and triton_unsupported_reason(arguments) is None else "gather"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}.")
    reason = triton_unsupported_reason(arguments) if backend == "triton" else None
    if reason:
        raise ValueError(f"backend={backend!r} cannot run this: {reason}; use backend='auto'.")
    return backend


_TRITON_BLOCK_SIZES = (16, 32, 64, 128)
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_unsupported_reason(arguments: DecodeArguments) -> str | None:
    """Why the Triton kernels cannot run this, or None if they can."""
    query = arguments.query
    if query.dtype not in _TRITON_DTYPES:
        return f"they compute bfloat16, float16 and float32, not {query.dtype}"
    if arguments.block_size not in _TRITON_BLOCK_SIZES:
        return f"block_size must be among {_TRITON_BLOCK_SIZES}, got {arguments.block_size}"
    if query.shape[3] > 256:
        return f"head_dim must be at most 256, got {query.shape[3]}"
    return triton_missing_reason(query.device)
