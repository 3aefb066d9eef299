"""FlashAttention-4's block-sparse kernels (package ``flash-attn-4``) as two backends.

``flash`` takes its forward kernel and our Triton backward, whose gradients repeat bit for bit.
``flash_atomic`` takes its backward too, which adds up dQ in whatever order tiles end (on Hopper it
has no other); it knows no tile mass, which then comes from a kernel of ours that computes one
product per tile. The lists are derived from the pattern's without waiting for the device.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments
from dilated_attention_pytorch.ops.operators import (
    NAMESPACE,
    Apply,
    differentiable,
    empty_results,
)

BLOCK = 128


def _installed() -> str | None:
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


# Looked up once: torch.compile cannot trace it.
_VERSION = _installed()


def flash_unsupported_reason(args: Arguments) -> str | None:
    """Why FlashAttention-4 cannot run this, or None if it can."""
    query, pattern, mask = args.query, args.pattern, args.mask
    if _VERSION is None:
        return "the package flash-attn-4 is not installed (extra [flash])"
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) != (9, 0):
        return "this backend is tested on Hopper GPUs (compute capability 9.0) alone"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, not {query.dtype}"
    if pattern.block_size != (BLOCK, BLOCK):
        return f"its backward needs blocks of {BLOCK}, got {pattern.block_size}"
    if query.shape[3] not in (64, 128):
        return f"head_dim must be 64 or 128, got {query.shape[3]}"
    if query.shape[1] % BLOCK or args.key.shape[1] % BLOCK or 0 in query.shape:
        return f"lengths must be positive multiples of {BLOCK}"
    if args.block_bias is not None:
        return "it takes no block bias"
    if mask.key_lengths is not None or mask.document_ids is not None:
        return "it takes no key lengths and no documents"
    if mask.causal and (query.shape[1] != args.key.shape[1] or mask.query_offset is None):
        return "a causal mask needs as many queries as keys"
    if mask.causal and (isinstance(mask.query_offset, Tensor) or mask.query_offset != 0):
        return "a causal mask needs query_offset 0"
    if args.scale <= 0:
        return f"scale must be positive, got {args.scale}"
    return None


def flash_attention(args: Arguments, *, atomic: bool = False) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_attention` defines them.

    Args:
        args: The call.
        atomic: Take FlashAttention-4's backward as well, which does not repeat bit for bit.
    """
    pattern = args.pattern
    starts, slots = args.transpose()
    out, lse = _attend(
        args.query, args.key, args.value, pattern.kv_num_blocks, pattern.kv_indices,
        args.mass_probe, starts, slots, args.mask.causal, args.scale, atomic,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op(f"{NAMESPACE}::flash_forward", mutates_args=())
def flash_forward_op(
    query: Tensor, key: Tensor, value: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor,
    mass_probe: Tensor | None, starts: Tensor | None, slots: Tensor | None, causal: bool,
    scale: float, atomic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse; the probe, ``starts``, ``slots`` and ``atomic`` matter to the gradient."""
    from flash_attn.cute.interface import _flash_attn_fwd

    lists = tiles(row_lists(query, kv_num_blocks, kv_indices, causal))
    out, lse, *_ = _flash_attn_fwd(
        query, key, value, softmax_scale=scale, mask_mod=causal_mask() if causal else None,
        block_sparse_tensors=lists, return_lse=True, pack_gqa=False,
    )  # fmt: skip
    return out, lse


flash_forward_op.register_fake(empty_results)


@torch.library.custom_op(f"{NAMESPACE}::flash_backward", mutates_args=())
def flash_backward_op(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor,
    value: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, starts: Tensor, slots: Tensor,
    causal: bool, scale: float, atomic: bool, want_mass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, and the tile mass (empty if not wanted)."""
    from dilated_attention_pytorch.ops.block_sparse_attention.triton_backward import launch_backward
    from dilated_attention_pytorch.ops.block_sparse_attention.triton_by_products import launch_mass
    from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import Call

    call = Call(
        query, key, value, kv_num_blocks, kv_indices, None, None, None, None, None,
        BLOCK, BLOCK, causal, 0, scale,
    )  # fmt: skip
    if not atomic:
        dq, dk, dv, _, mass = launch_backward(
            call, out, lse, grad_out, grad_lse, starts, slots, False, want_mass
        )
        return dq, dk, dv, mass
    from flash_attn.cute.interface import _flash_attn_bwd

    lists = tiles(column_lists(query, kv_indices, starts, slots, causal))
    dq, dk, dv = _flash_attn_bwd(
        query, key, value, out, grad_out, lse, scale,
        mask_mod=causal_mask() if causal else None, block_sparse_tensors=lists, dlse=grad_lse,
    )  # fmt: skip
    mass = query.new_empty(kv_indices.shape if want_mass else (0,), dtype=torch.float32)
    if want_mass:
        launch_mass(call, lse, grad_out, mass)
    return dq, dk, dv, mass


@flash_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, kv_indices = *args[4:7], args[8]
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    shape = kv_indices.shape if args[-1] else (0,)
    return dq, dk, dv, query.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, counts, indices, probe, starts, slots, *constants = inputs
    ctx.save_for_backward(*output, query, key, value, counts, indices, starts, slots)
    ctx.constants = constants
    ctx.probe_dtype = None if probe is None else probe.dtype
    ctx.set_materialize_grads(False)


def _backward(
    run: Apply, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    out, lse, *saved = ctx.saved_tensors
    want_mass = ctx.needs_input_grad[5]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.to(out.dtype).contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    dq, dk, dv, mass = run(grad_out, grad_lse, out, lse, *saved, *ctx.constants, want_mass)
    return dq, dk, dv, None, None, mass.to(ctx.probe_dtype) if want_mass else None, *[None] * 5


_attend = differentiable(flash_forward_op, flash_backward_op, _setup_context, _backward)


def _per_head(x: Tensor, batch: int, heads: int) -> Tensor:
    """``(b or 1, p, ...)`` as ``(b, h, ...)``."""
    if x.shape[1] != 1 and x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x.expand(batch, heads, *x.shape[2:]).contiguous()


def tiles(lists: dict[str, Any]) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(**lists, block_size=(BLOCK, BLOCK))


def row_lists(query: Tensor, counts: Tensor, indices: Tensor, causal: bool) -> dict[str, Any]:
    """The pattern as FlashAttention-4 wants it: per query block, masked and full tiles apart."""
    batch, _, heads, _ = query.shape
    counts, indices = _per_head(counts, batch, heads), _per_head(indices, batch, heads)
    rows = torch.arange(counts.shape[2], device=counts.device, dtype=torch.int32)
    masked = torch.zeros_like(counts)
    if causal:
        # Lists ascend: the diagonal tile is the last. Later ones hold nothing visible.
        used = torch.arange(indices.shape[3], device=indices.device) < counts[..., None]
        earlier = (used & (indices < rows[:, None])).sum(-1, dtype=torch.int32)
        masked = (used & (indices == rows[:, None])).sum(-1, dtype=torch.int32)
        counts = earlier
    diagonal = rows.view(1, 1, -1, 1).expand(batch, heads, -1, 1).contiguous()
    return {
        "mask_block_cnt": masked,
        "mask_block_idx": diagonal,
        "full_block_cnt": counts,
        "full_block_idx": indices,
    }


def column_lists(
    query: Tensor, indices: Tensor, starts: Tensor, slots: Tensor, causal: bool
) -> dict[str, Any]:
    """The transposed pattern: per key block, masked and full tiles apart."""
    batch, _, heads, _ = query.shape
    query_blocks, width = indices.shape[2:]
    columns = starts.shape[-1] - 1
    count = starts.diff(dim=-1)
    place = starts[..., :-1, None] + torch.arange(query_blocks, device=starts.device)
    place = place.clamp(max=max(slots.shape[-1] - 1, 0)).flatten(2).long()
    found = slots.gather(-1, place).view(*starts.shape[:2], columns, query_blocks)
    row = found // width
    diagonal = torch.arange(columns, device=starts.device, dtype=torch.int32)
    used = torch.arange(query_blocks, device=starts.device) < count[..., None]
    masked = torch.zeros_like(count)
    if causal:
        # Lists ascend: what precedes the diagonal tile holds nothing visible, and is shifted out.
        before = (used & (row < diagonal[:, None])).sum(-1, dtype=torch.int32)
        masked = (used & (row == diagonal[:, None])).sum(-1, dtype=torch.int32)
        skip = (before + masked)[..., None] + torch.arange(query_blocks, device=starts.device)
        skip = skip.clamp(max=query_blocks - 1)
        row = row.gather(-1, skip)
        count = count - before - masked

    def spread(x: Tensor) -> Tensor:
        return _per_head(x.int(), batch, heads)

    return {
        "mask_block_cnt": spread(masked),
        "mask_block_idx": spread(diagonal.view(1, 1, -1, 1).expand(*count.shape, 1)),
        "full_block_cnt": spread(count),
        "full_block_idx": spread(row),
    }


@functools.cache
def causal_mask() -> Any:
    """The token rule of a diagonal tile, in FlashAttention-4's language."""
    from cutlass import cute

    @cute.jit  # type: ignore[untyped-decorator]
    def not_future(
        batch: Any, head: Any, row: Any, column: Any, seqlen_info: Any, aux_tensors: Any
    ) -> Any:
        return column <= row

    return not_future
