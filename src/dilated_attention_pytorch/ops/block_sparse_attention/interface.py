"""The public op: checks its arguments, picks a backend, calls it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import (
    Arguments,
    arrange,
    check_arguments,
)
from dilated_attention_pytorch.ops.block_sparse_attention.cpp import (
    auto_unsupported_reason,
    cpp_attention,
    cpp_unsupported_reason,
)
from dilated_attention_pytorch.ops.block_sparse_attention.flash import (
    flash_attention,
    flash_unsupported_reason,
)
from dilated_attention_pytorch.ops.block_sparse_attention.gather import gather_attention
from dilated_attention_pytorch.ops.block_sparse_attention.reference import reference_attention
from dilated_attention_pytorch.ops.operators import triton_missing_reason
from dilated_attention_pytorch.pattern import BlockPattern

Backend = Callable[[Arguments], tuple[Tensor, Tensor | None]]


def dense_attention(args: Arguments) -> tuple[Tensor, None]:
    """PyTorch's own attention, for patterns that leave nothing out; there is no lse.

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


def _triton_attention(args: Arguments) -> tuple[Tensor, Tensor]:
    # Triton is imported on first use: the package itself needs torch alone.
    from dilated_attention_pytorch.ops.block_sparse_attention.triton_forward import triton_attention

    return triton_attention(args)


BACKENDS: dict[str, Backend] = {
    "reference": reference_attention,
    "dense": dense_attention,
    "gather": gather_attention,
    "cpp": cpp_attention,
    "triton": _triton_attention,
    "flash": flash_attention,
    "flash_atomic": partial(flash_attention, atomic=True),
}


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    causal: bool = False,
    scale: float | None = None,
    block_bias: Tensor | None = None,
    mass_probe: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over the tiles that ``pattern`` keeps.

    For query token n in query block i and head h:

    .. math:: o_n = \sum_m \mathrm{softmax}_m(s\, q_n \cdot k_m + \beta_{ij(m)})\, v_m

    over the allowed tokens m of the kept key blocks j. With every block kept this is dense
    attention.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``, any floating dtype.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``; ``num_kv_heads`` divides ``num_heads``,
            and query head ``h`` reads KV head ``h // (num_heads // num_kv_heads)``.
        value: Shaped like ``key``.
        pattern: The tiles to compute, for these lengths; its batch is 1 or ``batch``, its heads
            are 1, ``num_kv_heads`` or ``num_heads``.
        causal: Hide later keys. Aligned bottom-right: query n sees keys up to
            ``n + kv_len - q_len``, unless ``query_offset`` says otherwise.
        scale: Factor of the logits. None: ``head_dim ** -0.5``.
        block_bias: β, added to every logit of a tile: shaped like ``pattern.kv_indices`` (batch
            may be 1). Its gradient is the sum of the logits' gradient over the tile. A tile with
            -inf is not read; NaN or +inf makes the rows that read the tile NaN.
        mass_probe: Same shape. The forward pass ignores its values; its *gradient* is the tile
            mass ``Σ_n w_n Σ_m P_nm`` with ``w_n = ‖dO_n‖ / Σ_n' ‖dO_n'‖`` over the rows of the
            query block (and the heads that share the pattern): where the tile's attention went,
            weighted by how much the loss cares about each row; a row that reads nothing has weight
            0. None: not computed.
        key_lengths: ``(batch,)`` integers: keys from there on are padding. None: no padding.
        cu_seqlens: Cumulative document lengths ``(documents + 1,)`` for batch 1, or
            ``(batch, documents + 1)``: tokens see their own document only. None: one document.
        query_offset: Key position of query 0: an int or ``(batch,)`` integers, as far away as you
            like. None: ``kv_len - q_len``.
        backend: ``"auto"`` or a name in ``BACKENDS``; see :func:`explain_backend`. ``"auto"`` takes
            PyTorch's dense attention if the pattern is known to keep every tile
            (``BlockPattern.complete_for``), no mask hides anything and neither ``block_bias``,
            ``mass_probe`` nor the lse is asked for. On a CPU it takes ``"cpp"`` for float32 from
            9,000,000 dense logits on: a kernel that the user's C++ compiler builds at first use
            (kept in ``~/.cache``; not in traced programs; environment variable
            ``DILATED_ATTENTION_CPP=0``: never).
        return_lse: Also return the log-sum-exp of the logits.

    Returns:
        The output, shaped and typed like ``query`` (in the autocast dtype under autocast); with
        ``return_lse`` also ``(batch, num_heads, q_len)`` in float32 (float64 for float64). A row
        with nothing to read returns 0 and an lse of -inf. Both are differentiable.

        What no query reads (padding, blocks that are not kept, rows that read nothing and the
        gradients that arrive there) may hold anything, NaN included: no bit of the results hangs
        on it, and its gradient is 0. NaN and infinities where they are read make the rows that
        read them NaN or infinite, and no others (``"flash"`` does not promise this inside the
        tiles that the causal mask cuts).

    Raises:
        TypeError: If inputs are not floating point or mix dtypes.
        ValueError: If shapes, devices, pattern and lengths do not fit together, or the backend
            is unknown.

    Example:
        >>> import torch
        >>> q = k = v = torch.randn(1, 128, 2, 16)
        >>> everything = torch.ones(2, 2, dtype=torch.bool)
        >>> pattern = BlockPattern.from_dense(everything, q_len=128, kv_len=128)
        >>> block_sparse_attention(q, k, v, pattern, causal=True).shape
        torch.Size([1, 128, 2, 16])
    """
    arguments = check_arguments(
        query, key, value, pattern, causal=causal, scale=scale, block_bias=block_bias,
        mass_probe=mass_probe, key_lengths=key_lengths, cu_seqlens=cu_seqlens,
        query_offset=query_offset,
    )  # fmt: skip
    name, _ = choose_backend(arguments, backend, return_lse)
    out, lse = BACKENDS[name](arguments)
    # A backend without lse is not chosen where it is asked for.
    return out if lse is None or not return_lse else (out, lse)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    mask: AttentionMask,
    *,
    scale: float | None,
    block_bias: Tensor | None,
    mass_probe: Tensor | None,
    backend: str,
) -> Tensor:
    """:func:`block_sparse_attention` for layers, which checked their inputs and made the mask."""
    arguments = arrange(
        query, key, value, pattern, mask, scale=scale, block_bias=block_bias, mass_probe=mass_probe
    )
    name, _ = choose_backend(arguments, backend)
    return BACKENDS[name](arguments)[0]


def choose_backend(arguments: Arguments, backend: str, return_lse: bool = False) -> tuple[str, str]:
    """Picks the backend and says why.

    Returns:
        Its name and the reason.

    Raises:
        ValueError: If ``backend`` is unknown, or named and unable to take these arguments.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(
                f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}."
            )
        if backend == "dense":
            reason = dense_unsupported_reason(arguments, return_lse)
        else:
            reason = _UNSUPPORTED.get(backend, lambda _: None)(arguments)
        if reason:
            raise ValueError(f"backend={backend!r} cannot run this: {reason}; use backend='auto'.")
        return backend, "asked for by name"
    if dense_unsupported_reason(arguments, return_lse) is None:
        return "dense", "the pattern keeps every tile"
    device = arguments.query.device.type
    if device == "cpu" and auto_unsupported_reason(arguments) is None:
        return "cpp", "the compiled kernel runs on this CPU"
    if device != "cuda":
        return "gather", f"the PyTorch path runs on {device}"
    reason = _triton_unsupported_reason(arguments)
    if reason:
        return "gather", f"the Triton kernels cannot run this: {reason}"
    if flash_unsupported_reason(arguments) is None:
        return "flash", "FlashAttention-4's forward is faster here; the backward is ours"
    return "triton", "the fused kernels run on this GPU"


_TRITON_BLOCK_SIZES = (16, 32, 64, 128)
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _triton_unsupported_reason(arguments: Arguments) -> str | None:
    """Why the Triton kernels cannot run this, or None if they can."""
    query = arguments.query
    if query.dtype not in _TRITON_DTYPES:
        return f"they compute bfloat16, float16 and float32, not {query.dtype}"
    sizes = arguments.pattern.block_size
    if any(size not in _TRITON_BLOCK_SIZES for size in sizes):
        return f"block sizes must be among {_TRITON_BLOCK_SIZES}, got {sizes}"
    if query.shape[3] > 256:
        return f"head_dim must be at most 256, got {query.shape[3]}"
    return triton_missing_reason(query.device)


# What a backend cannot run; the others run everything.
_UNSUPPORTED: dict[str, Callable[[Arguments], str | None]] = {
    "cpp": cpp_unsupported_reason,
    "triton": _triton_unsupported_reason,
    "flash": flash_unsupported_reason,
    "flash_atomic": flash_unsupported_reason,
}


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    causal: bool = False,
    scale: float | None = None,
    block_bias: Tensor | None = None,
    mass_probe: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> str:
    """Says which backend :func:`block_sparse_attention` runs for the same arguments, and why.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 64, 2, 16)
        >>> pattern = BlockPattern.from_dense(torch.ones(1, 1).bool(), q_len=64, kv_len=64)
        >>> explain_backend(q, q, q, pattern)
        'gather: the PyTorch path runs on cpu'
    """
    arguments = check_arguments(
        query, key, value, pattern, causal=causal, scale=scale, block_bias=block_bias,
        mass_probe=mass_probe, key_lengths=key_lengths, cu_seqlens=cu_seqlens,
        query_offset=query_offset,
    )  # fmt: skip
    return ": ".join(choose_backend(arguments, backend, return_lse))
