"""The PyTorch backend: batched products over gathered key blocks, a bounded chunk at a time.

Rows (query blocks) that read equally many key blocks form one batch, so nothing is padded; the
backward pass recomputes the probabilities of a chunk from the saved lse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments
from dilated_attention_pytorch.ops.block_sparse_attention.row_groups import (
    RowGroup,
    RowGroups,
    group_rows,
)

# Logits of one chunk, by device type. At 8,192 tokens, 8 heads of 64, sparsity 0.9 on 2 cores,
# forward + backward took 0.46 s with 2**19, 0.37 s with 2**21 and 0.41 s with 2**23.
_CHUNK_ELEMENTS = {"cpu": 1 << 21}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


def gather_attention(args: Arguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_attention` defines them.

    Memory beyond inputs and outputs: their copies in blocks, and some chunks of
    ``size_q × keys read`` logits. Waits for the device.
    """
    out, lse = _GatherAttention.apply(
        args.query, args.key, args.value, args.block_bias, args.mass_probe, args
    )
    return out, lse


class _GatherAttention(torch.autograd.Function):
    """Attention over a pattern's tiles; see the module."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_bias: Tensor | None,
        mass_probe: Tensor | None,
        args: Arguments,
    ) -> tuple[Tensor, Tensor]:
        # Autocast would run the float32 products in half precision.
        with torch.autocast(query.device.type, enabled=False):
            limit = _CHUNK_ELEMENTS.get(query.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
            rows = group_rows(args, limit)
            out, lse = _forward(query, key, value, block_bias, args, rows)
        ctx.save_for_backward(query, key, value, block_bias, lse)
        ctx.rows = rows
        # Without the tensors that are saved above, so that the graph does not keep them twice.
        ctx.pattern, ctx.scale = args.pattern, args.scale
        ctx.probe_dtype = None if mass_probe is None else mass_probe.dtype
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query = ctx.saved_tensors[0]
        with torch.autocast(query.device.type, enabled=False):
            return (*_backward(ctx, grad_out, grad_lse), None)


class _Products:
    """The tensors of one call cut into blocks, and the products that both passes need."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_bias: Tensor | None,
        scale: float,
        block_size: tuple[int, int],
        rows: RowGroups,
    ) -> None:
        self.size_q, self.size_k = block_size
        self.head_dim, self.scale, self.hidden = query.shape[3], scale, rows.hidden
        self.query = to_blocks(query, self.size_q)
        self.key, self.value = to_blocks(key, self.size_k), to_blocks(value, self.size_k)
        self.bias = None if block_bias is None else block_bias.flatten()
        # Reusing a few buffers spares the page faults of fresh ones.
        self._tiles = max((group.slots.numel() for group in rows.groups), default=0)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A contiguous uninitialised tensor, the same memory for the same name."""
        if name not in self._buffers:
            tile = self.size_k * max(self.size_q, self.head_dim)
            self._buffers[name] = self.query.new_empty(self._tiles * tile)
        size = 1
        for length in shape:
            size *= length
        return self._buffers[name][:size].view(shape)

    def gather(self, name: str, blocks: Tensor, group: RowGroup) -> Tensor:
        """The key or value blocks that each row reads, ``(r, c * size_k, d)``."""
        r, c = group.keys.shape
        tiles = self.buffer(name, (r * c, self.size_k, self.head_dim))
        torch.index_select(blocks, 0, group.keys.flatten(), out=tiles)
        if group.unread is not None:
            # 0 * nan is nan: what nobody reads must not reach a sum.
            tiles.masked_fill_(group.unread.view(r * c, self.size_k, 1), 0)
        return tiles.view(r, c * self.size_k, self.head_dim)

    def mask(self, group: RowGroup) -> Tensor | None:
        """What to add to the logits: ``(r, size_q, c * size_k)``, or r = 1 for all rows alike."""
        r, c = group.slots.shape
        if self.bias is None and group.shared is not None:
            row = self.query.new_zeros(1, self.size_q, c * self.size_k)
            row[..., -self.size_k :].masked_fill_(self.hidden[group.shared], -torch.inf)
            return row
        if self.bias is None and group.masked is None:
            return None
        mask = self.buffer("mask", (r, self.size_q, c * self.size_k))
        tiles = mask.view(r, self.size_q, c, self.size_k)
        if self.bias is None:
            mask.zero_()
        else:
            tiles.copy_(self.bias[group.slots].view(r, 1, c, 1))
        if group.shared is not None:
            tiles[:, :, -1].masked_fill_(self.hidden[group.shared], -torch.inf)
        elif group.masked is not None:
            row, place, number = group.masked
            hidden = self.hidden[number]
            tiles[row, :, place] = tiles[row, :, place].masked_fill_(hidden, -torch.inf)
        return mask


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_bias: Tensor | None,
    args: Arguments,
    rows: RowGroups,
) -> tuple[Tensor, Tensor]:
    b, n, h, _ = query.shape
    x = _Products(query, key, value, block_bias, args.scale, args.pattern.block_size, rows)
    attend = _attend_cpu if query.device.type == "cpu" else _attend
    out, lse = torch.empty_like(x.query), x.query.new_empty(x.query.shape[:2])
    out[rows.empty], lse[rows.empty] = 0, -torch.inf
    for group in rows.groups:
        k, v = x.gather("key", x.key, group), x.gather("value", x.value, group)
        mask = x.mask(group)
        some_out, some_lse = attend(x.query[group.rows], k, v, mask, args.scale)
        if mask is not None and mask.shape[0] == group.rows.numel():
            blind = mask.amax(-1) == -torch.inf
            some_out, some_lse = (
                some_out.masked_fill(blind[..., None], 0),
                some_lse.masked_fill(blind, -torch.inf),
            )
        out[group.rows], lse[group.rows] = some_out, some_lse
    lse = lse.view(b, h, ceil_div(n, x.size_q) * x.size_q)[:, :, :n]
    return from_blocks(out, b, n, h, query.dtype), lse


def _attend_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its lse; rows that see nothing hold no meaningful lse.

    The fused op took 80 ms of one core where :func:`_attend` took 118 (docs/log.md).
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, None],
        key[:, None],
        value[:, None],
        attn_mask=None if mask is None else mask[:, None],
        scale=scale,
    )
    return out[:, 0], lse[:, 0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in plain products, for any device."""
    s = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
    if mask is not None:
        s += mask
    lse = s.logsumexp(-1)
    return torch.bmm(s.sub_(lse[..., None]).exp_(), value), lse


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> list[Tensor | None]:
    """Gradients of query, key, value, block_bias and mass_probe."""
    query, key, value, block_bias, lse = ctx.saved_tensors
    rows, pattern = ctx.rows, ctx.pattern
    b, n, h, _ = query.shape
    m, num_kv_heads = key.shape[1:3]
    x = _Products(query, key, value, block_bias, ctx.scale, pattern.block_size, rows)
    grad = torch.zeros_like(query) if grad_out is None else grad_out
    weight = _row_weights(grad, pattern.num_heads, x.size_q, x.query.dtype)
    grad = to_blocks(grad, x.size_q)
    # Rows that read nothing: exp(s - inf) is 0, and what they hold must not reach a sum.
    empty = _rows_to_blocks(lse == -torch.inf, x.size_q, True)
    lse = _rows_to_blocks(lse, x.size_q, torch.inf).masked_fill_(empty, torch.inf)[..., None]
    if bool(empty.any()):
        x.query.masked_fill_(empty[..., None], 0)
        grad.masked_fill_(empty[..., None], 0)
    if grad_lse is not None:
        grad_lse = _rows_to_blocks(grad_lse, x.size_q, 0).masked_fill_(empty, 0)[..., None]
    needs_q, needs_k, needs_v, needs_bias, needs_mass = ctx.needs_input_grad[:5]
    dq, dk, dv = torch.empty_like(x.query), torch.zeros_like(x.key), torch.zeros_like(x.value)
    slots = pattern.kv_indices.numel()
    d_bias, mass = (x.query.new_zeros(slots if needs else 0) for needs in (needs_bias, needs_mass))
    dq[rows.empty] = 0
    for group in rows.groups:
        r, c = group.slots.shape
        k, v = x.gather("key", x.key, group), x.gather("value", x.value, group)
        q, g = x.query.index_select(0, group.rows), grad.index_select(0, group.rows)
        p = x.buffer("logits", (r, x.size_q, c * x.size_k))
        torch.baddbmm(p, q, k.transpose(1, 2), beta=0, alpha=ctx.scale, out=p)
        mask = x.mask(group)
        if mask is not None:
            p += mask
        p.sub_(lse[group.rows]).exp_()
        if needs_mass:
            column = torch.bmm(weight[group.rows][:, None], p)
            mass.index_add_(0, group.slots.flatten(), column.view(r * c, x.size_k).sum(-1))
        ds = torch.bmm(g, v.transpose(1, 2), out=x.buffer("grad", tuple(p.shape)))
        if needs_v:
            # The gathered values are no longer needed: their place takes the gradient.
            torch.bmm(p.transpose(1, 2), g, out=v)
            dv.index_add_(0, group.keys.flatten(), v.view(r * c, *dv.shape[1:]))
        _softmax_backward(ds, p, None if grad_lse is None else grad_lse[group.rows])
        if needs_bias:
            column = ds.sum(1)
            d_bias.index_add_(0, group.slots.flatten(), column.view(r * c, x.size_k).sum(-1))
        if needs_q:
            dq[group.rows] = torch.bmm(ds, k).mul_(ctx.scale)
        if needs_k:
            torch.baddbmm(k, ds.transpose(1, 2), q, beta=0, alpha=ctx.scale, out=k)
            dk.index_add_(0, group.keys.flatten(), k.view(r * c, *dk.shape[1:]))
    shape = pattern.kv_indices.shape
    return [
        from_blocks(dq, b, n, h, query.dtype) if needs_q else None,
        from_blocks(dk, b, m, num_kv_heads, key.dtype) if needs_k else None,
        from_blocks(dv, b, m, num_kv_heads, value.dtype) if needs_v else None,
        d_bias.view(shape) if needs_bias else None,
        mass.view(shape).to(ctx.probe_dtype) if needs_mass else None,
    ]


def _softmax_backward(grad: Tensor, p: Tensor, grad_lse: Tensor | None) -> None:
    """Turns dP into ``dS = P (dP - Σ P dP + dlse)``, in place."""
    torch.ops.aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=grad)
    if grad_lse is not None:
        grad.addcmul_(p, grad_lse)


def to_blocks(x: Tensor, size: int) -> Tensor:
    """``(b, n, h, d)`` to ``(b * h * blocks, size, d)`` in the accumulation dtype, zero-padded."""
    b, n, h, d = x.shape
    blocks = ceil_div(n, size)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(b, h, blocks * size, d, dtype=dtype, device=x.device)
    out[:, :, :n] = x.transpose(1, 2)
    out[:, :, n:] = 0
    return out.view(b * h * blocks, size, d)


def from_blocks(x: Tensor, batch: int, length: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Undoes :func:`to_blocks`; a strided view if the dtype is already right."""
    padded = ceil_div(length, x.shape[1]) * x.shape[1]
    heads_first = x.view(batch, heads, padded, x.shape[2])[:, :, :length]
    return heads_first.transpose(1, 2).to(dtype)


def _rows_to_blocks(x: Tensor, size: int, fill: float | bool) -> Tensor:
    """``(b, h, n)`` to a fresh ``(b * h * blocks, size)``, padded with ``fill``."""
    b, h, n = x.shape
    blocks = ceil_div(n, size)
    out = x.new_full((b, h, blocks * size), fill)
    out[:, :, :n] = x
    return out.view(b * h * blocks, size)


def _row_weights(grad: Tensor, pattern_heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """Each row's share of ``‖dO‖`` in its query block and pattern head, ``(b * h * i, size)``."""
    b, n, h, _ = grad.shape
    norm = torch.linalg.vector_norm(grad, dim=-1, dtype=dtype).transpose(1, 2)
    norm = _rows_to_blocks(norm, size, 0)
    shared = norm.view(b, pattern_heads, h // pattern_heads, ceil_div(n, size), size)
    total = shared.sum((2, 4), keepdim=True).clamp_(min=torch.finfo(dtype).tiny)
    return (shared / total).view(norm.shape)
