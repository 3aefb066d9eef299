"""The PyTorch backend: batched products over gathered key blocks, a bounded chunk at a time.

Rows (query blocks) that read equally many key blocks form one batch, so nothing is padded; the
backward pass recomputes the probabilities of a chunk from the saved lse. Memory beyond inputs and
outputs: some chunks of ``size_q × keys read`` logits with the keys and values they belong to (and
float32 copies of half-precision inputs). Waits for the device. As operators both passes are opaque
to ``torch.compile``, mappable, and differentiable once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments
from dilated_attention_pytorch.ops.block_sparse_attention.row_groups import (
    RowGroup,
    RowGroups,
    group_rows,
)
from dilated_attention_pytorch.ops.operators import NAMESPACE, Apply, differentiable
from dilated_attention_pytorch.pattern import BlockPattern

# Logits of one chunk, by device type. On 2 CPU cores 2**18 to 2**21 take the same time.
_CHUNK_ELEMENTS = {"cpu": 1 << 21}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24
# From here on float32's rounding of an lse is a thousandth and more of the weights.
_STEEP = 1 << 14


class _Tokens:
    """One input as rows of ``head_dim`` numbers, from which blocks are gathered token by token.

    Gathering straight from the input spares a copy of it in blocks, whose fresh memory costs more
    than the copying.
    """

    def __init__(self, x: Tensor, size: int) -> None:
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        self.rows, self.strides = rows_and_steps(x)
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.size, self.blocks = size, ceil_div(self.length, size)
        # A partial last block repeats the last token; masks or an infinite lse leave it out.
        self._tokens = torch.arange(size, device=x.device)

    def index(self, blocks: Tensor) -> Tensor:
        """Rows of the tokens of blocks, given as places in the flattened ``(b, h, blocks)``."""
        head = blocks.div(self.blocks, rounding_mode="floor")
        sample = head.div(self.heads, rounding_mode="floor")
        base = sample * self.strides[0] + (head - sample * self.heads) * self.strides[2]
        first = (blocks - head * self.blocks) * self.size
        token = first[:, None] + self._tokens
        if self.length % self.size:
            token.clamp_(max=self.length - 1)
        return token.mul_(self.strides[1]).add_(base[:, None]).flatten()

    def gather(self, index: Tensor, out: Tensor) -> Tensor:
        """Fills ``out`` ``(blocks, size, head_dim)`` with the rows of :meth:`index`."""
        torch.index_select(self.rows, 0, index, out=out.view(-1, self.head_dim))
        return out


def rows_and_steps(x: Tensor) -> tuple[Tensor, list[int]]:
    """``(b, n, h, d)`` as rows of d numbers, and the steps of b, n and h in rows; a view if it can.

    Places are ``sum(step * index)``.
    """
    dim = x.shape[3]
    if x.stride(3) != 1 or any(x.stride(axis) % dim for axis in range(3)):
        x = x.contiguous()
    steps = [x.stride(axis) // dim for axis in range(3)]
    last = sum((n - 1) * step for n, step in zip(x.shape[:3], steps, strict=True))
    return x.as_strided((last + 1 if x.numel() else 0, dim), (dim, 1)), steps


class _Products:
    """The tensors of one call, and the products that both passes need."""

    def __init__(self, args: Arguments, rows: RowGroups) -> None:
        self.size_q, self.size_k = args.pattern.block_size
        self.head_dim, self.scale, self.hidden = args.query.shape[3], args.scale, rows.hidden
        self.query = _Tokens(args.query, self.size_q)
        self.key, self.value = _Tokens(args.key, self.size_k), _Tokens(args.value, self.size_k)
        self.bias = None if args.block_bias is None else args.block_bias.flatten()
        # Reusing a few buffers spares the page faults of fresh ones.
        self._tiles = max((group.slots.numel() for group in rows.groups), default=0)
        self._rows = max((group.rows.numel() for group in rows.groups), default=0)
        self._buffers: dict[str, Tensor] = {}

    def new_blocks(self, tokens: _Tokens, *, zero: bool = False) -> Tensor:
        """A tensor for the blocks of an input, ``(b * h * blocks, size, head_dim)``."""
        make = torch.zeros if zero else torch.empty
        return make(
            tokens.batch * tokens.heads * tokens.blocks, tokens.size, tokens.head_dim,
            dtype=tokens.rows.dtype, device=tokens.rows.device,
        )  # fmt: skip

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A contiguous uninitialised tensor, the same memory for the same name."""
        if name not in self._buffers:
            tile = self.size_k * max(self.size_q, self.head_dim)
            size = max(self._tiles * tile, self._rows * self.size_q * self.head_dim)
            self._buffers[name] = self.query.rows.new_empty(size)
        return self._buffers[name][: math.prod(shape)].view(shape)

    def gather_rows(self, name: str, tokens: _Tokens, group: RowGroup) -> Tensor:
        """The query blocks of a group, ``(r, size_q, d)``."""
        out = self.buffer(name, (group.rows.numel(), self.size_q, self.head_dim))
        return tokens.gather(tokens.index(group.rows), out)

    def gather_keys(self, group: RowGroup) -> tuple[Tensor, Tensor]:
        """The key and value blocks that each row reads, ``(r, c * size_k, d)`` each."""
        r, c = group.keys.shape
        index, gathered = None, []
        for name, tokens in (("key", self.key), ("value", self.value)):
            tiles = self.buffer(name, (r * c, self.size_k, self.head_dim))
            if index is None or self.key.strides != self.value.strides:
                index = tokens.index(group.keys.flatten())
            tokens.gather(index, tiles)
            if group.unread is not None:
                # 0 * nan is nan: what nobody reads must not reach a sum.
                tiles.masked_fill_(group.unread.view(r * c, self.size_k, 1), 0)
            gathered.append(tiles.view(r, c * self.size_k, self.head_dim))
        return gathered[0], gathered[1]

    def hide(self, pairs: Tensor, group: RowGroup, value: float) -> Tensor:
        """Writes ``value`` where a query token of ``(r, size_q, c * size_k)`` sees no key.

        Written, not added or multiplied: what stands there may be NaN or infinite.
        """
        if group.shared is not None:
            pairs[..., -self.size_k :].masked_fill_(self.hidden[group.shared], value)
        elif group.masked is not None:
            row, place, number = group.masked
            tiles = pairs.view(*pairs.shape[:2], -1, self.size_k)
            tiles[row, :, place] = tiles[row, :, place].masked_fill_(self.hidden[number], value)
        return pairs

    def hidden_pairs(self, group: RowGroup) -> Tensor | None:
        """The pairs that :meth:`hide` writes, as booleans; None if there are none."""
        if group.shared is None and group.masked is None:
            return None
        r, c = group.slots.shape
        nothing = self.hidden.new_zeros(r, self.size_q, c * self.size_k)
        return self.hide(nothing, group, True)

    def logits(self, query: Tensor, key: Tensor, group: RowGroup) -> Tensor:
        """``scale * query @ key^T + bias``, in a buffer; of hidden pairs too."""
        r, c = group.slots.shape
        s = self.buffer("logits", (r, self.size_q, c * self.size_k))
        # With a factor of 0 there would be no product at all, and NaN in it would not be seen.
        torch.baddbmm(s, query, key.transpose(1, 2), beta=0, alpha=self.scale or 1.0, out=s)
        if not self.scale:
            s.mul_(0.0)
        if self.bias is not None:
            tiles = s.view(r, self.size_q, c, self.size_k)
            tiles += self.bias[group.slots].view(r, 1, c, 1)
        return s

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, group: RowGroup, finite: bool
    ) -> tuple[Tensor, Tensor]:
        """Softmax attention (in a buffer) and its lse; a row that sees nothing gives 0 and -inf."""
        p = self.hide(self.logits(query, key, group), group, -torch.inf)
        highest = p.amax(-1, keepdim=True)
        # A row of -inf alone must not become NaN.
        p.sub_(highest.clamp(min=torch.finfo(p.dtype).min)).exp_()
        total = p.sum(-1, keepdim=True)
        hidden = None if finite else self.hidden_pairs(group)
        out = weighted_sum(p, value, hidden, self.buffer("out", tuple(query.shape)))
        out.div_(total.clamp(min=torch.finfo(p.dtype).tiny))
        # An infinite logit takes all the weight: its lse is infinite as well, not inf - inf.
        lse = total.log_().add_(highest).masked_fill_(highest == torch.inf, torch.inf)
        return out, lse.squeeze(-1)


def weighted_sum(
    weights: Tensor, x: Tensor, hidden: Tensor | None, out: Tensor, factor: float = 1.0
) -> Tensor:
    """Fills ``out`` with ``factor * weights @ x``, without what is hidden.

    Args:
        weights: ``(r, n, m)``, 0 for hidden pairs.
        x: ``(r, m, d)``. NaN and infinities in it reach those rows alone that see them, although
            0 * NaN is NaN.
        hidden: Booleans ``(r, n, m)``. None: nothing is, or ``x`` is finite.
        out: ``(r, n, d)``.
        factor: Multiplies the result.
    """
    if hidden is None or not bool((special := ~x.isfinite().all(-1)).any()):
        return torch.baddbmm(out, weights, x, beta=0, alpha=factor, out=out)
    rest = x.masked_fill(special[..., None], 0)
    torch.baddbmm(out, weights, rest, beta=0, alpha=factor, out=out)
    step = max(_CHUNK_ELEMENTS["cpu"] // (out.shape[1] * out.shape[2]), 1)
    for some in special.nonzero().split(step):
        row, place = some.unbind(1)
        products = weights[row, :, place][..., None] * x[row, place][:, None, :] * factor
        products.masked_fill_(hidden[row, :, place][..., None], 0)
        out.index_add_(0, row, products)
    return out


def all_finite(x: Tensor) -> bool:
    """Whether no number of ``x`` is NaN or infinite; False if the sum overflows. One pass."""
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return bool(x.detach().sum(dtype=wide).isfinite())


def _prepare(args: Arguments) -> tuple[_Products, RowGroups]:
    """Lists the tiles; in the backward pass anew: less than a hundredth of the pass."""
    limit = _CHUNK_ELEMENTS.get(args.query.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    rows = group_rows(args, limit)
    return _Products(args, rows), rows


def _forward(args: Arguments) -> tuple[Tensor, Tensor]:
    b, n, h, _ = args.query.shape
    x, rows = _prepare(args)
    out = x.new_blocks(x.query)
    lse = out.new_empty(out.shape[:2])
    out[rows.empty], lse[rows.empty] = 0, -torch.inf
    finite = all_finite(args.value)
    for group in rows.groups:
        k, v = x.gather_keys(group)
        q = x.gather_rows("query", x.query, group)
        some_out, some_lse = x.attend(q, k, v, group, finite)
        out.index_copy_(0, group.rows, some_out)
        lse.index_copy_(0, group.rows, some_lse)
    lse = lse.view(b, h, ceil_div(n, x.size_q) * x.size_q)[:, :, :n]
    return from_blocks(out, b, n, h, args.query.dtype), lse


def _backward(
    args: Arguments,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, block bias and mass probe; empty where not needed."""
    query, key, value, pattern = args.query, args.key, args.value, args.pattern
    b, n, h, _ = query.shape
    m, num_kv_heads = key.shape[1:3]
    x, rows = _prepare(args)
    # An expanded gradient, as of a sum, is slow to reduce.
    grad = torch.zeros_like(query) if grad_out is None else grad_out.contiguous()
    weight = _row_weights(grad, lse, pattern.num_heads, x.size_q)
    grad_tokens = _Tokens(grad, x.size_q)
    finite = all_finite(query) and all_finite(key) and all_finite(grad)
    # Rows that read nothing: exp(s - inf) is 0, and what they hold must not reach a sum.
    empty = _rows_to_blocks(lse == -torch.inf, x.size_q, True)
    # So large that another kernel's lse, rounded otherwise, would give weights above 1 or none.
    steep = bool((lse.abs().masked_fill(lse.isinf(), 0) > _STEEP).any())
    lse = _rows_to_blocks(lse, x.size_q, torch.inf).masked_fill_(empty, torch.inf)[..., None]
    has_empty = empty.any(-1)
    if grad_lse is not None:
        grad_lse = _rows_to_blocks(grad_lse, x.size_q, 0).masked_fill_(empty, 0)[..., None]
    needs_q, needs_k, needs_v, needs_bias, needs_mass = needs
    dq = x.new_blocks(x.query)
    dk, dv = x.new_blocks(x.key, zero=True), x.new_blocks(x.value, zero=True)
    slots = pattern.kv_indices.numel()
    d_bias, mass = (dq.new_zeros(slots if needs else 0) for needs in (needs_bias, needs_mass))
    dq[rows.empty] = 0
    for group in rows.groups:
        r, c = group.slots.shape
        k, v = x.gather_keys(group)
        q = x.gather_rows("query", x.query, group)
        g = x.gather_rows("grad rows", grad_tokens, group)
        hidden = None if finite else x.hidden_pairs(group)
        some = has_empty[group.rows].nonzero().squeeze(-1)
        none_read = empty[group.rows[some]][..., None]
        for rows_of in (q, g):
            _clear(rows_of, some, none_read)
        p = x.logits(q, k, group)
        if steep:
            torch.softmax(x.hide(p, group, -torch.inf), -1, out=p)
        else:
            p.sub_(lse[group.rows]).exp_()
        x.hide(p, group, 0)
        _clear(p, some, none_read)
        if needs_mass:
            column = torch.bmm(weight[group.rows][:, None], p)
            mass.index_add_(0, group.slots.flatten(), column.view(r * c, x.size_k).sum(-1))
        ds = torch.bmm(g, v.transpose(1, 2), out=x.buffer("grad", tuple(p.shape)))
        x.hide(ds, group, 0)
        _clear(ds, some, none_read)
        to_keys = None if hidden is None else hidden.transpose(1, 2)
        if needs_v:
            # The gathered values are no longer needed: their place takes the gradient.
            weighted_sum(p.transpose(1, 2), g, to_keys, v)
            dv.index_add_(0, group.keys.flatten(), v.view(r * c, *dv.shape[1:]))
        _softmax_backward(ds, p, None if grad_lse is None else grad_lse[group.rows])
        # Again: the row's sum, or the gradient of its lse, may be NaN.
        x.hide(ds, group, 0)
        if needs_bias:
            column = ds.sum(1)
            d_bias.index_add_(0, group.slots.flatten(), column.view(r * c, x.size_k).sum(-1))
        if needs_q:
            # The gathered output gradient is no longer needed.
            dq.index_copy_(0, group.rows, weighted_sum(ds, k, hidden, g, args.scale))
        if needs_k:
            weighted_sum(ds.transpose(1, 2), q, to_keys, k, args.scale)
            dk.index_add_(0, group.keys.flatten(), k.view(r * c, *dk.shape[1:]))
    # A result must not be the memory of another.
    return (
        from_blocks(dq, b, n, h, query.dtype) if needs_q else lse.new_empty(0),
        from_blocks(dk, b, m, num_kv_heads, key.dtype) if needs_k else lse.new_empty(0),
        from_blocks(dv, b, m, num_kv_heads, value.dtype) if needs_v else lse.new_empty(0),
        d_bias.view(pattern.kv_indices.shape) if needs_bias else d_bias,
        mass.view(pattern.kv_indices.shape) if needs_mass else mass,
    )


def _clear(x: Tensor, some: Tensor, tokens: Tensor) -> None:
    """Writes 0 into ``tokens`` ``(s, size_q, 1)`` of the rows ``some`` ``(s,)``, in place."""
    if some.numel():
        x[some] = x[some].masked_fill_(tokens, 0)


def _softmax_backward(grad: Tensor, p: Tensor, grad_lse: Tensor | None) -> None:
    """Turns dP into ``dS = P (dP - Σ P dP + dlse)``, in place."""
    torch.ops.aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=grad)
    if grad_lse is not None:
        grad.addcmul_(p, grad_lse)


def from_blocks(x: Tensor, batch: int, length: int, heads: int, dtype: torch.dtype) -> Tensor:
    """``(b * h * blocks, size, d)`` as ``(b, n, h, d)``: a strided view, or a copy in ``dtype``."""
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


def _row_weights(grad: Tensor, lse: Tensor, pattern_heads: int, size: int) -> Tensor:
    """Each row's share of ``‖dO‖`` in its query block and pattern head, ``(b * h * i, size)``.

    Rows that read nothing have none, whatever gradient arrives there.
    """
    b, n, h, _ = grad.shape
    norm = torch.linalg.vector_norm(grad, dim=-1, dtype=lse.dtype).transpose(1, 2)
    norm = _rows_to_blocks(norm.masked_fill(lse == -torch.inf, 0), size, 0)
    shared = norm.view(b, pattern_heads, h // pattern_heads, ceil_div(n, size), size)
    total = shared.sum((2, 4), keepdim=True).clamp_(min=torch.finfo(lse.dtype).tiny)
    return (shared / total).view(norm.shape)


def gather_attention(args: Arguments) -> tuple[Tensor, Tensor]:
    """Computes output and lse as :func:`block_sparse_attention` defines them."""
    out, lse = _attend(*flatten(args))
    return out, lse


def flatten(args: Arguments) -> tuple[Any, ...]:
    """What the forward operator takes: tensors with the batch first, and plain numbers."""
    pattern, mask = args.pattern, args.mask
    per_sample = isinstance(mask.query_offset, Tensor)
    return (
        args.query, args.key, args.value, pattern.kv_num_blocks, pattern.kv_indices,
        args.block_bias, args.mass_probe, mask.key_lengths,
        mask.query_offset if per_sample else None, mask.document_ids, *pattern.block_size,
        mask.causal, 0 if per_sample else mask.query_offset, args.scale,
    )  # fmt: skip


def unflatten(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor,
    block_bias: Tensor | None, key_lengths: Tensor | None, query_offset: Tensor | None,
    document_ids: Tensor | None, block_q: int, block_k: int, causal: bool, offset: int,
    scale: float,
) -> Arguments:  # fmt: skip
    """The call that :func:`flatten` took apart, without its mass probe."""
    n, m = query.shape[1], key.shape[1]
    pattern = BlockPattern(counts, indices, n, m, (block_q, block_k), check_values=False)
    where = offset if query_offset is None else query_offset
    mask = AttentionMask(n, m, causal, where, key_lengths, document_ids)
    return Arguments(query, key, value, pattern, mask, scale, block_bias, None)


@torch.library.custom_op(f"{NAMESPACE}::gather_forward", mutates_args=())
def forward_op(
    query: Tensor, key: Tensor, value: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor,
    block_bias: Tensor | None, mass_probe: Tensor | None, key_lengths: Tensor | None,
    query_offset: Tensor | None, document_ids: Tensor | None, block_q: int, block_k: int,
    causal: bool, offset: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse; ``mass_probe`` matters to the gradient alone."""
    args = unflatten(
        query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
        document_ids, block_q, block_k, causal, offset, scale,
    )  # fmt: skip
    # Autocast would run the float32 products in half precision.
    with torch.autocast(query.device.type, enabled=False):
        return _forward(args)


@forward_op.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, n, h, _ = query.shape
    block_q = rest[9]
    blocks = _blocks_like(query, block_q)
    lse = blocks.new_empty(b, h, ceil_div(n, block_q) * block_q)[:, :, :n]
    return from_blocks(blocks, b, n, h, query.dtype), lse


def _blocks_like(x: Tensor, size: int) -> Tensor:
    """The layout in which gather.py accumulates ``(b, n, h, d)``."""
    b, n, h, d = x.shape
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.new_empty(b * h * ceil_div(n, size), size, d, dtype=wide)


@torch.library.custom_op(f"{NAMESPACE}::gather_backward", mutates_args=())
def backward_op(
    grad_out: Tensor | None, grad_lse: Tensor | None, lse: Tensor, query: Tensor, key: Tensor,
    value: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, block_bias: Tensor | None,
    key_lengths: Tensor | None, query_offset: Tensor | None, document_ids: Tensor | None,
    block_q: int, block_k: int, causal: bool, offset: int, scale: float, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, block bias and mass probe; empty where not needed."""
    args = unflatten(
        query, key, value, kv_num_blocks, kv_indices, block_bias, key_lengths, query_offset,
        document_ids, block_q, block_k, causal, offset, scale,
    )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        return _backward(args, lse, grad_out, grad_lse, needs)


@backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    lse, query, key, value, kv_indices = *args[2:6], args[7]
    block_q, block_k, needs = args[12], args[13], args[-1]
    results = []
    for x, size in ((query, block_q), (key, block_k), (value, block_k)):
        b, n, h, _ = x.shape
        results.append(from_blocks(_blocks_like(x, size), b, n, h, x.dtype))
    results += [lse.new_empty(kv_indices.shape) for _ in range(2)]
    pairs = zip(results, needs, strict=True)
    return tuple(x if needed else lse.new_empty(0) for x, needed in pairs)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what :func:`backward` needs: the inputs and the lse."""
    (
        query, key, value, counts, indices, bias, probe, lengths, offsets, documents, *constants,
    ) = inputs  # fmt: skip
    ctx.save_for_backward(
        output[1], query, key, value, counts, indices, bias, lengths, offsets, documents
    )
    ctx.constants = constants
    ctx.probe_dtype = None if probe is None else probe.dtype
    ctx.set_materialize_grads(False)


def backward(
    run: Apply, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    """Gradients of all inputs of the forward operator; see :func:`differentiable`."""
    needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:7]]
    grads = run(grad_out, grad_lse, *ctx.saved_tensors, *ctx.constants, needs)
    dq, dk, dv, dbias, mass = (
        x if needed else None for x, needed in zip(grads, needs, strict=True)
    )
    if mass is not None:
        mass = mass.to(ctx.probe_dtype)
    return (dq, dk, dv, None, None, dbias, mass, *(None,) * 8)


_attend = differentiable(forward_op, backward_op, setup_context, backward)
