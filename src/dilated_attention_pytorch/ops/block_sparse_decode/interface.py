"""The public decode op: its oracle, the PyTorch path, and the choice of a backend."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention.arguments import readable
from dilated_attention_pytorch.ops.block_sparse_attention.cpp import (
    AUTO_LOGITS,
    build_failure,
    library,
)
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
from dilated_attention_pytorch.ops.operators import rows_of, triton_missing_reason
from dilated_attention_pytorch.runtime import tracing


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

    Does not wait for the device; lists shorter than the widest cost as much as the widest, on the
    CPU as the longest one.
    """
    if args.query.device.type == "cpu" and args.counts.numel() and not tracing():
        width, bias = int(args.counts.max()), args.block_bias
        args = replace(
            args, indices=args.indices[..., :width],
            block_bias=None if bias is None else bias[..., :width],
        )  # fmt: skip
    with torch.autocast(args.query.device.type, enabled=False):
        return _decode(args)


def _decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """One row per list and KV head: the query heads of its tokens that share keys and list."""
    batch, n, heads, dim = args.query.shape
    wide = torch.float64 if args.query.dtype == torch.float64 else torch.float32
    if 0 in (args.query.numel(), args.key.numel(), args.indices.numel()):
        nothing = args.query.new_full((batch, heads, n), -torch.inf, dtype=wide)
        return torch.zeros_like(args.query), nothing
    kv_heads, (list_heads, lists) = args.key.shape[2], args.counts.shape[1:]
    planes = max(kv_heads, list_heads)
    shape = (batch, planes, lists, n // lists, heads // planes)
    rows = planes * lists
    query = args.query.reshape(batch, lists, shape[3], planes, shape[4], dim)
    query = query.permute(0, 3, 1, 2, 4, 5).reshape(batch, rows, -1, dim).to(wide) * args.scale
    places, hidden, bias = _tokens(args, planes)
    head = torch.arange(rows, device=query.device) // (rows // kv_heads)
    limit = _CHUNK_NUMBERS.get(query.device.type, _CHUNK_NUMBERS_ELSEWHERE)
    step = min(max(limit // (places.shape[-1] * dim), 1), rows)
    outs, norms = [], []
    for sample in range(batch):
        own = slice(sample, sample + 1)
        (keys, steps), (values, value_steps) = map(rows_and_steps, (args.key[own], args.value[own]))
        for first in range(0, rows, step):
            part = slice(first, first + step)
            tokens, unseen = places[sample, part], hidden[sample, part]
            index = (tokens * steps[1] + head[part, None] * steps[2]).flatten()
            k = keys.index_select(0, index).view(*tokens.shape, dim).to(wide)
            if value_steps != steps:
                index = (tokens * value_steps[1] + head[part, None] * value_steps[2]).flatten()
            v = values.index_select(0, index).view(*tokens.shape, dim).to(wide)
            asked = query[sample, part]
            logits = torch.bmm(asked, k.mT)
            if bias is not None:
                logits += bias[sample, part]
            of_tokens = logits.view(-1, *shape[3:], tokens.shape[-1])
            of_tokens.masked_fill_(unseen, -torch.inf)
            if args.wants_lse:
                norms.append(logits.logsumexp(-1))
            empty = (logits == -torch.inf).all(-1, keepdim=True)
            # Values that are not finite reach those queries of a list alone that see them: a later
            # one may see more than an earlier one.
            pairs = None
            if shape[3] > 1 and readable(v) and not all_finite(v):
                pairs = unseen.expand(of_tokens.shape).flatten(1, 2)
            found = weighted_sum(logits.softmax(-1), v, pairs, torch.empty_like(asked))
            # A row that sees nothing has weights of NaN, and what it would read may be NaN.
            outs.append(found.masked_fill_(empty, 0))
    out = torch.cat(outs).view(*shape, dim).permute(0, 2, 3, 1, 4, 5).reshape(args.query.shape)
    lse = out.new_empty(0)
    if norms:
        lse = torch.cat(norms).view(shape).permute(0, 1, 4, 2, 3).reshape(batch, heads, n)
    return out.to(args.query.dtype), lse


def _tokens(args: DecodeArguments, planes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cache positions of the tokens of each row, what its queries do not see, and a bias.

    Returns:
        ``(b, r, m)`` for r rows, planes by lists, of m tokens; booleans ``(b, r, n / lists, 1,
        m)``; and None or ``(b, r, 1, m)``.
    """
    size, lists = args.block_size, args.counts.shape[2]
    last = args.key.shape[1] - 1
    inside = torch.arange(size, device=args.indices.device)
    # What is not listed lies behind the cache, where nobody sees it.
    block = torch.where(args.listed(), args.indices, last // size + 1)
    token = (block[..., None] * size + inside).flatten(-2)
    limits = args.limits().view(-1, 1, lists, args.query.shape[1] // lists, 1)
    hidden = token[..., None, :] >= limits
    # What nobody sees repeats the first token that is seen. The last query sees all that those
    # before it see.
    token = torch.where(hidden[:, :, :, -1], token.amin(-1, keepdim=True), token)
    if args.starts is not None:
        token = token + args.starts.long().view(-1, 1, 1, 1)
    token = token.clamp(0, last)
    parts = [token, hidden]
    if args.block_bias is not None:
        parts.append(args.block_bias.repeat_interleave(size, -1))
    if (repeat := planes // token.shape[1]) > 1:
        parts = [x.repeat_interleave(repeat, 1) for x in parts]
    token, hidden, *bias = (x.flatten(1, 2) for x in parts)
    return token, hidden[..., None, :], bias[0][:, :, None] if bias else None


class _Decode(ctypes.Structure):
    """``Decode`` of ``cpp_decode.cpp``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "query", "key", "value", "counts", "indices", "bias", "lengths", "starts", "out", "lse",
        )),
        *((name, ctypes.c_int64 * 3) for name in (
            "query_step", "key_step", "value_step", "count_step",
        )),
        *((name, ctypes.c_int64 * 4) for name in ("index_step", "bias_step")),
        *((name, ctypes.c_int64) for name in (
            "batch", "queries", "capacity", "heads", "kv_heads", "lists", "head_dim", "width",
            "block_size", "threads",
        )),
        ("scale", ctypes.c_double),
    )  # fmt: skip


def cpp_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    """:func:`reference_decode` by the compiled kernel."""
    query, key, value = (rows_of(x) for x in (args.query, args.key, args.value))
    (b, n, h, d), (m, g), bias = query.shape, key.shape[1:3], args.block_bias
    lengths, starts = (
        None if x is None else x.long().contiguous() for x in (args.lengths, args.starts)
    )
    out, lse = query.new_empty(b, n, h, d), query.new_empty(b, h, n)
    # In the order of the fields; the tuple keeps what is made here alive during the call.
    tensors = (query, key, value, args.counts, args.indices, bias, lengths, starts, out, lse)

    def steps(x: Tensor) -> list[int]:
        # One list may stand for all tokens.
        return [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]

    problem = _Decode(
        *(None if x is None else x.data_ptr() for x in tensors),
        query.stride()[:3], key.stride()[:3], value.stride()[:3], tuple(steps(args.counts)),
        tuple(steps(args.indices)), (0,) * 4 if bias is None else tuple(steps(bias)),
        b, n, m, h, g, args.counts.shape[1], d, args.indices.shape[3], args.block_size,
        torch.get_num_threads(), args.scale,
    )  # fmt: skip
    if out.numel() and library().block_sparse_decode(ctypes.byref(problem)):
        raise MemoryError("The compiled CPU kernel found no memory for its buffers.")
    return out, lse


def cpp_unsupported_reason(arguments: DecodeArguments) -> str | None:
    """Why the compiled kernel cannot run this, or None if it can; builds it if need be."""
    query = arguments.query
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return f"it computes float32 on the CPU, not {query.dtype} on {query.device.type}"
    if torch.compiler.is_compiling():
        return "a traced program may run where there is no compiler"
    return build_failure()


Backend = Callable[[DecodeArguments], tuple[Tensor, Tensor]]


def _triton_decode(args: DecodeArguments) -> tuple[Tensor, Tensor]:
    # Triton is imported on first use: the package itself needs torch alone.
    from dilated_attention_pytorch.ops.block_sparse_decode.triton_decode import triton_decode

    return triton_decode(args)


BACKENDS: dict[str, Backend] = {
    "reference": reference_decode,
    "gather": gather_decode,
    "cpp": cpp_decode,
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
        backend: ``"auto"`` or a name in ``BACKENDS``. ``"auto"`` takes ``"triton"`` on CUDA, and on
            a CPU for float32 ``"cpp"`` where ``block_sparse_attention`` takes it for one prompt
            as long as the cache; else ``"gather"``.
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
        if arguments.query.device.type == "cuda":
            return "triton" if triton_unsupported_reason(arguments) is None else "gather"
        heads, tokens = arguments.query.shape[2], arguments.key.shape[1]
        pays = heads * tokens * tokens >= AUTO_LOGITS
        return "cpp" if pays and cpp_unsupported_reason(arguments) is None else "gather"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}.")
    able = {"triton": triton_unsupported_reason, "cpp": cpp_unsupported_reason}
    reason = able[backend](arguments) if backend in able else None
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
