"""Checks what callers hand to the op and brings it into the one form that backends take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.runtime import check_floating


@dataclass(frozen=True, eq=False)
class Arguments:
    """Checked arguments of one call.

    Attributes:
        query: ``(b, n, h, d)``.
        key: ``(b, m, g, d)``; ``g`` divides ``h``.
        value: ``(b, m, g, d)``.
        pattern: With ``b`` samples (expanded, stride 0, if it was shared); its heads ``p`` are
            1, ``g`` or ``h``.
        mask: The token rule inside the kept tiles.
        scale: Factor of the logits.
        block_bias: ``(b, p, i, k)`` or None, in float32 (float64 for float64 inputs).
        mass_probe: ``(b, p, i, k)`` or None: takes the tile mass as its gradient.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: BlockPattern
    mask: AttentionMask
    scale: float
    block_bias: Tensor | None
    mass_probe: Tensor | None

    def transpose(self) -> tuple[Tensor | None, Tensor | None]:
        """Offsets and slots of the pattern's transpose, where a gradient will need them."""
        inputs = (self.query, self.key, self.value, self.block_bias, self.mass_probe)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            turned = self.pattern.transpose()
            return turned.offsets, turned.slots
        return None, None


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    causal: bool,
    scale: float | None,
    block_bias: Tensor | None,
    mass_probe: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    query_offset: int | Tensor | None,
) -> Arguments:
    """Validates and normalises; see ``block_sparse_attention`` for the meaning of each."""
    check_qkv(query, key, value)
    mask = make_mask(
        query.shape[0], query.shape[1], key.shape[1], device=query.device, causal=causal,
        key_lengths=key_lengths, cu_seqlens=cu_seqlens, query_offset=query_offset,
    )  # fmt: skip
    return arrange(
        query, key, value, pattern, mask, scale=scale, block_bias=block_bias, mass_probe=mass_probe
    )


def arrange(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    mask: AttentionMask,
    *,
    scale: float | None,
    block_bias: Tensor | None,
    mass_probe: Tensor | None,
) -> Arguments:
    """:func:`check_arguments` of inputs that were checked and whose mask was made before."""
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"pattern must be a BlockPattern, got {type(pattern).__name__}.")
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, num_kv_heads = key.shape[1], key.shape[2]
    if (pattern.q_len, pattern.kv_len) != (q_len, kv_len):
        raise ValueError(
            f"pattern was made for q_len={pattern.q_len}, kv_len={pattern.kv_len}, but query has "
            f"{q_len} tokens and key {kv_len}; build it for these lengths."
        )
    # Compared one by one: torch.compile does not find a symbol among others.
    if pattern.batch_size != 1 and pattern.batch_size != batch:
        raise ValueError(f"pattern must hold 1 or batch={batch} samples, got {pattern.batch_size}.")
    if all(pattern.num_heads != heads for heads in (1, num_kv_heads, num_heads)):
        raise ValueError(
            f"pattern must have 1, num_kv_heads={num_kv_heads} or num_heads={num_heads} heads, "
            f"got {pattern.num_heads}."
        )
    if pattern.device != query.device:
        raise ValueError(
            f"pattern is on {pattern.device} but query on {query.device}; use pattern.to(...)."
        )
    scale = check_scale(scale, head_dim)
    if pattern.batch_size != batch:
        pattern = replace(
            pattern,
            kv_num_blocks=pattern.kv_num_blocks.expand(batch, -1, -1),
            kv_indices=pattern.kv_indices.expand(batch, -1, -1, -1),
            check_values=False,
        )
    slots = pattern.kv_indices.shape
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    block_bias = _check_per_slot("block_bias", block_bias, slots, query.device)
    mass_probe = _check_per_slot("mass_probe", mass_probe, slots, query.device)
    if block_bias is not None:
        block_bias = block_bias.to(accumulate)
    if autocasting(query.device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return Arguments(query, key, value, pattern, mask, scale, block_bias, mass_probe)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the logits; None: ``head_dim ** -0.5``.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite in float32.
    """
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}.")
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be finite in float32, got {scale}.")
    return float(scale)


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for a device; there is none for tensors without values."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_qkv(query: Tensor, key: Tensor, value: Tensor, *, cached: bool = False) -> None:
    """Checks layout, dtypes, devices and head counts of the three inputs.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``.
        value: Shaped like ``key``.
        cached: Call keys and values ``key_cache`` and ``value_cache`` in errors.

    Raises:
        TypeError: If one is not a floating-point tensor, or the dtypes differ.
        ValueError: If shapes or devices disagree.
    """
    names = ("query", "key_cache", "value_cache") if cached else ("query", "key", "value")
    for name, x in zip(names, (query, key, value), strict=True):
        check_floating(name, x)
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, seq_len, num_heads, head_dim), got shape {tuple(x.shape)}."
            )
    if not autocasting(query.device) and not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{', '.join(names)} must share one dtype, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}; cast them or use autocast."
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"{', '.join(names)} must be on one device, got "
            f"{query.device}, {key.device}, {value.device}."
        )
    if key.shape != value.shape:
        raise ValueError(
            f"{names[1]} and {names[2]} must have one shape, got {tuple(key.shape)} and "
            f"{tuple(value.shape)}."
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query and {names[1]} must have one batch size, got {query.shape[0]} and "
            f"{key.shape[0]}."
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and {names[1]} must have one head_dim, got {query.shape[3]} and {key.shape[3]}."
        )
    if query.shape[3] < 1:
        raise ValueError("query must have a head_dim of at least 1, got 0.")
    if min(key.shape[2], query.shape[2]) < 1 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"num_kv_heads must divide num_heads={query.shape[2]}, got {key.shape[2]}."
        )


def make_mask(
    batch: int,
    q_len: int,
    kv_len: int,
    *,
    device: torch.device,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    query_offset: int | Tensor | None = None,
) -> AttentionMask:
    """Builds the token rule from public arguments.

    Values are checked when the tensors are on the CPU; on a GPU only shapes and dtypes are,
    so that nothing waits for the device: lengths out of range count as the nearest that fit there.
    An offset beyond the tokens means the same as the furthest that matters: query 0 sees all keys
    or the last query none, so that none is too large for the arithmetic behind it.

    Raises:
        TypeError: If lengths are not integers.
        ValueError: If shapes or values do not fit, or arguments exclude each other.
    """
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, (batch,), device)
        if readable(key_lengths) and bool(((key_lengths < 0) | (key_lengths > kv_len)).any()):
            raise ValueError(
                f"key_lengths must lie in [0, {kv_len}] (the tokens of key), got "
                f"{key_lengths.tolist()}."
            )
        if not readable(key_lengths):
            key_lengths = key_lengths.clamp(0, kv_len)
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        # There sizes of tensors are tensors, which an offset of each sample would be.
        q_len, kv_len = int(q_len), int(kv_len)
    offset: int | Tensor = kv_len - q_len
    if isinstance(query_offset, Tensor):
        check_lengths("query_offset", query_offset, (batch,), device)
        offset = query_offset.clamp(-q_len, kv_len)
    elif isinstance(query_offset, int):
        offset = min(max(query_offset, -q_len), kv_len)
    elif query_offset is not None:
        raise TypeError(
            f"query_offset must be an int or an integer Tensor, got {type(query_offset).__name__}."
        )
    document_ids = None
    if cu_seqlens is not None:
        if q_len != kv_len:
            raise ValueError(
                "cu_seqlens needs queries and keys of the same packed tokens, got "
                f"{q_len} query and {kv_len} key tokens."
            )
        if query_offset is not None or key_lengths is not None:
            raise ValueError("cu_seqlens excludes key_lengths and query_offset; give one of them.")
        document_ids = document_numbers(cu_seqlens, batch, q_len, device)
    return AttentionMask(q_len, kv_len, causal, offset, key_lengths, document_ids)


def document_numbers(cu_seqlens: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    """Turns cumulative lengths into the document number of every token.

    Args:
        cu_seqlens: ``(documents + 1,)`` for ``batch == 1``, or ``(batch, documents + 1)``;
            integers from 0, never falling; tokens from the last entry on are padding. A row may
            repeat its last entry to fill up.
        batch: Samples.
        length: Tokens per sample.
        device: Where the inputs are.

    Returns:
        ``(batch, length)`` int32, -1 for padding.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be an integer Tensor, got {type(cu_seqlens).__name__}.")
    rows = cu_seqlens[None] if cu_seqlens.dim() == 1 else cu_seqlens
    if cu_seqlens.dim() not in (1, 2) or rows.shape[0] != batch or rows.shape[1] < 2:
        raise ValueError(
            f"cu_seqlens must be (documents + 1,) with batch 1 or (batch={batch}, documents + 1), "
            f"got shape {tuple(cu_seqlens.shape)}."
        )
    check_lengths("cu_seqlens", rows, tuple(rows.shape), device)
    if readable(rows) and (
        bool((rows[:, 0] != 0).any())
        or bool((rows[:, 1:] < rows[:, :-1]).any())
        or bool((rows[:, -1] > length).any())
    ):
        raise ValueError(
            f"cu_seqlens must start at 0, never fall and end at most at {length} (the packed "
            f"tokens), got {cu_seqlens.tolist()}."
        )
    position = torch.arange(length, device=device).expand(batch, length).contiguous()
    number = torch.searchsorted(rows[:, 1:].long().contiguous(), position, right=True)
    return torch.where(number < rows.shape[1] - 1, number, -1).int()


def readable(x: Tensor) -> bool:
    """Whether looking at the values costs no wait for a device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_lengths(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Checks lengths or places of samples.

    Raises:
        TypeError: If they are not int32 or int64.
        ValueError: If shape or device do not fit.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be an integer Tensor, got {type(x).__name__}.")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}.")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}.")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like the inputs, got {x.device}.")


def _check_per_slot(
    name: str, x: Tensor | None, slots: torch.Size, device: torch.device
) -> Tensor | None:
    if x is None:
        return None
    check_floating(name, x)
    if x.dim() != 4 or (x.shape[0] != 1 and x.shape[0] != slots[0]) or x.shape[1:] != slots[1:]:
        raise ValueError(
            f"{name} must be shaped like pattern.kv_indices {tuple(slots)} (or with batch 1), got "
            f"{tuple(x.shape)}."
        )
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like query, got {x.device}.")
    return x.expand(slots)
