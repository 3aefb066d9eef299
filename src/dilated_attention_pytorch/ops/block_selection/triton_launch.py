"""Launches the Triton kernels of block selection: shapes, launch configurations, workspaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection import triton_kernels as kernels
from dilated_attention_pytorch.ops.triton_device import capability, on_device, strides

# Chunks of columns that the unit means are added up in, and columns that are read at a time.
_CHUNKS, _PART = 16, 32
# Tokens that one warp summarises at a time.
_TOKENS = 16
# Slots or tiles of one row that a program reads at a time.
_TILE = 64


@dataclass(frozen=True)
class Pooling:
    """How blocks are summarised.

    Attributes:
        names: Poolings in the order of the output.
        block_size: Tokens per block.
    """

    names: tuple[str, ...]
    block_size: int

    def constants(self, head_dim: int) -> dict[str, int]:
        """The kernels' compile-time arguments."""

        def place(name: str) -> int:
            return self.names.index(name) if name in self.names else -1

        return {
            "BLOCK": self.block_size,
            "T": triton.next_power_of_2(self.block_size),
            "D": triton.next_power_of_2(head_dim),
            "HEAD_DIM": head_dim,
            "MEAN": place("mean"),
            "MAX": place("max"),
            "MIN": place("min"),
            "ATTENTION": place("attention"),
            "POOLINGS": len(self.names),
        }

    def num_warps(self, head_dim: int) -> int:
        """Warps of a program: about 64 numbers a thread."""
        tile = triton.next_power_of_2(self.block_size) * triton.next_power_of_2(head_dim)
        return min(max(tile // 2048, 1), 16)


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is summarised.

    Attributes:
        x: ``(b, n, h, d)``, last dimension contiguous.
        valid: ``(1 or b, n)`` booleans, contiguous, or None.
        pool_query: ``(h, d)`` contiguous or None.
        out: Summaries ``(b, h, i, s)``.
    """

    x: Tensor
    valid: Tensor | None
    pool_query: Tensor | None
    out: Tensor


def launch_summaries(
    first: Tokens, pooling: Pooling, place: Tensor | None = None, second: Tokens | None = None
) -> None:
    """Writes summaries and, for the gradient, where maxima and minima lie.

    Args:
        first: Tokens.
        pooling: What to write.
        place: ``(b, h, i, 2, d)`` int16 or None.
        second: Other tokens for the same launch, with ``valid`` or ``pool_query`` if and only if
            ``first`` has them. Their extremes' places are not written.
    """
    parts = [first, second or first]
    batch, _, _, head_dim = first.x.shape
    programs = [part.out.shape[1] * part.out.shape[2] for part in parts]
    if second is None:
        programs[1] = 0
    if batch == 0 or head_dim == 0 or sum(programs) == 0:
        return
    block = pooling.block_size
    t = triton.next_power_of_2(block)
    even = all(part.x.shape[1] % block == 0 for part in parts)
    sizes = [(part.x.shape[1], part.out.shape[2], part.x.shape[2]) for part in parts]
    with on_device(first.x.device):
        kernels.summary_kernel[(sum(programs), batch)](
            *(value for part in parts for value in (part.x, *strides(part.x))),
            *(value for part in parts for value in _per_sample(part.valid, part.x)),
            *(part.x if part.pool_query is None else part.pool_query for part in parts),
            *(part.out for part in parts), first.out if place is None else place,
            *sizes[0], *sizes[1],
            **pooling.constants(head_dim), VALID=first.valid is not None, PLACE=place is not None,
            FULL=first.valid is None and block == t and even, PAIR=second is not None,
            CHUNK=min(t, _TOKENS), num_warps=1, **_overlap(first.x.device),
        )  # fmt: skip


def launch_summaries_grad(
    grad: Tensor,
    place: Tensor,
    x: Tensor,
    valid: Tensor | None,
    pool_query: Tensor | None,
    pooling: Pooling,
    grad_x: Tensor,
    grad_pool: Tensor | None,
) -> None:
    """Writes the gradient of the tokens, and each block's share of the pool query's.

    Args:
        grad: ``(b, h, i, s)`` contiguous.
        place: As the forward pass wrote it.
        x: As in the forward pass.
        valid: Likewise.
        pool_query: Likewise.
        pooling: Likewise.
        grad_x: ``(b, n, h, d)`` contiguous.
        grad_pool: ``(b, h, i, d)`` float32 or None.
    """
    if grad_x.numel() == 0:
        return
    batch, length, heads, head_dim = x.shape
    blocks = grad.shape[2]
    with on_device(x.device):
        kernels.summary_grad_kernel[(heads * blocks, batch)](
            grad, place, x, *strides(x), *_per_sample(valid, x),
            x if pool_query is None else pool_query, grad_x,
            grad_x if grad_pool is None else grad_pool, length, blocks, heads,
            **pooling.constants(head_dim), VALID=valid is not None,
            num_warps=pooling.num_warps(head_dim),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class BudgetInputs:
    """What a row's budget depends on, besides the level's tables.

    Attributes:
        means: ``(b, g, j, d)`` block means, or None for a budget that ignores content.
        gain: ``(p,)`` or None.
        offset: ``(p,)`` or None.
        base_sparsity: 0-dim float32.
        rule: ``(1 or b, 5, i)`` int32.
        diagonal: ``(1 or b, i)`` int64.
        document: ``(1 or b, i)`` int64.
        forced: ``(1 or b, 1 or p, i)``.
        limit: The same.
        filled: ``(1 or b, 1 or p, documents, width + 2)`` float32.
        rising: ``(1 or b, 1 or p, documents, width + 1)`` float32.
        visible: ``(1 or b, documents)`` float32.
        has_diagonal: Whether rows have a block of their own among the columns.
        max_factor: Bound of the content's factor.
    """

    means: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    base_sparsity: Tensor
    rule: Tensor
    diagonal: Tensor
    document: Tensor
    forced: Tensor
    limit: Tensor
    filled: Tensor
    rising: Tensor
    visible: Tensor
    has_diagonal: bool
    max_factor: float


def launch_budget(call: BudgetInputs, exact: Tensor, slope: Tensor, complexity: Tensor) -> None:
    """Writes real-valued budgets ``(b, p, i)`` and what their gradient needs."""
    batch, heads, rows = exact.shape
    if exact.numel() == 0:
        return
    device, means = exact.device, call.means
    columns, kv_heads, head_dim = 1, 1, 1
    prefix = totals = exact
    if means is not None:
        _, kv_heads, columns, head_dim = means.shape
        prefix = torch.empty(batch, kv_heads, columns, head_dim, device=device)
        totals = torch.empty(batch, kv_heads, _CHUNKS, head_dim, device=device)
    steps = triton.cdiv(columns, _CHUNKS * _PART)
    sizes = {
        "PART": _PART, "CHUNKS": _CHUNKS, "D": triton.next_power_of_2(head_dim),
        "HEAD_DIM": head_dim, "num_warps": 4,
    }  # fmt: skip
    width = call.rising.shape[-1] - 1
    with on_device(device):
        if means is not None:
            kernels.prefix_kernel[(triton.cdiv(columns, steps * _PART), batch * kv_heads)](
                means,
                *means.stride()[:3],
                prefix,
                totals,
                columns,
                steps,
                kv_heads,
                **sizes,
                **_overlap(device),
            )
        kernels.budget_kernel[(triton.cdiv(rows, 16), batch * heads)](
            *((exact, 0, 0, 0) if means is None else (means, *means.stride()[:3])), prefix, totals,
            call.rule, _step(call.rule), call.diagonal, _step(call.diagonal),
            call.document, _step(call.document), call.forced, *_steps(call.forced),
            call.limit, *_steps(call.limit), call.filled, *_steps(call.filled),
            call.rising, *_steps(call.rising), call.visible, _step(call.visible),
            exact if call.gain is None else call.gain,
            exact if call.offset is None else call.offset,
            call.base_sparsity, exact, slope, complexity,
            rows, columns, steps, heads, kv_heads, width, ROWS=16, **sizes,
            STEPS=(width + 2).bit_length(), ADAPTIVE=means is not None,
            DIAGONAL=call.has_diagonal, MAX_FACTOR=call.max_factor,
            PER_HEAD=kv_heads if heads == 1 else 1, **_overlap(device),
        )  # fmt: skip


def launch_round(exact: Tensor, rounded: Tensor, bits: int) -> None:
    """Writes integer budgets ``(b, p, i)`` in units of ``2**-bits``; one document."""
    batch, heads, rows = exact.shape
    if exact.numel() == 0:
        return
    chunk = min(triton.next_power_of_2(rows), 2048)
    with on_device(exact.device):
        kernels.round_kernel[(batch * heads,)](
            exact, rounded, rows, BITS=bits, CHUNK=chunk, num_warps=4, **_overlap(exact.device)
        )


@dataclass(frozen=True, eq=False)
class ChooseInputs:
    """One choice of blocks.

    Attributes:
        scores: ``(b, p, i, c)`` float32, last dimension contiguous.
        candidates: ``(1 or b, 1 or p, i, c)`` int32, or None: column c is key block c.
        rule: ``(1 or b, 5, i)`` int32.
        budget: ``(b, p, i)`` int32, forced blocks included, or None: see ``fixed_count``.
        seed: 0-dim int64, or None: no noise and no random blocks.
        temperature: 0-dim float32, of the noise.
        fixed_count: Scored blocks of every row without a ``budget``.
        explore: Random extra blocks.
    """

    scores: Tensor
    candidates: Tensor | None
    rule: Tensor
    budget: Tensor | None
    seed: Tensor | None
    temperature: Tensor | None
    fixed_count: int
    explore: int


def launch_choose(
    call: ChooseInputs,
    counts: Tensor,
    indices: Tensor,
    kept: Tensor | None,
    scored: Tensor | None,
) -> None:
    """Writes the lists ``(b, p, i, k)``, the kept tiles' scores and which were not forced."""
    batch, heads, rows, columns = call.scores.shape
    if counts.numel() == 0:
        return
    width = indices.shape[-1]
    if width == 0 or columns == 0:
        counts.zero_()
        return
    c = max(triton.next_power_of_2(columns), 32)
    candidates, noisy = call.candidates, call.seed is not None
    listed = candidates is not None
    lists = (0, 0, 0) if candidates is None else (*_steps(candidates), candidates.stride(2))
    with on_device(counts.device):
        kernels.choose_kernel[(rows * batch * heads,)](
            call.scores, *call.scores.stride()[:3],
            candidates if listed else call.rule, *lists,
            call.rule, _step(call.rule), counts if call.budget is None else call.budget,
            call.seed if noisy else call.rule,
            call.scores if call.temperature is None else call.temperature,
            counts, indices, indices if kept is None else kept,
            indices if scored is None else scored.view(torch.uint8),
            rows, columns, heads, call.fixed_count, call.explore, width,
            C=c, W=triton.next_power_of_2(width), LISTS=listed, BUDGET=call.budget is not None,
            NOISE=noisy, EXPLORE=noisy and call.explore > 0, KEPT=kept is not None,
            EVEN=columns % 16 == 0,
            # 32 programs of one warp fit on a multiprocessor, if their registers do.
            maxnreg=64 if c <= 512 else None,
            num_warps=min(max(c // 512, 1), 32), **_overlap(counts.device),
        )  # fmt: skip


def launch_towers(
    queries: Tensor,
    keys: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gain: Tensor,
    factor: float,
    outs: tuple[Tensor, Tensor],
) -> None:
    """Writes ``(b, h / share, i or j, share * r)``: first maps of both sides' summaries.

    Args:
        queries: ``(b, g, i, s)``, last dimension contiguous.
        keys: ``(b, g', j, s)``, likewise.
        query_weight: ``(h, s, r)`` contiguous.
        key_weight: The same.
        gain: 0-dim factor of the queries' maps.
        factor: Another one.
        outs: Contiguous float32.
    """
    heads, size, rank = query_weight.shape
    batch, rows, num_keys = queries.shape[0], queries.shape[2], keys.shape[2]
    tile = 64
    tiles = triton.cdiv(rows, tile) + triton.cdiv(num_keys, tile)
    if tiles == 0 or batch == 0:
        return
    with on_device(queries.device):
        kernels.tower_kernel[(tiles, batch * heads)](
            queries, *queries.stride()[:3], keys, *keys.stride()[:3],
            query_weight, key_weight, gain, *outs, rows, num_keys, heads,
            heads // queries.shape[1], heads // keys.shape[1], heads // outs[0].shape[1], factor,
            ROWS=tile, S=triton.next_power_of_2(size), SIZE=size,
            PART=min(max(triton.next_power_of_2(size), 16), 64),
            R=max(triton.next_power_of_2(rank), 16), RANK=rank, num_warps=4,
            **_overlap(queries.device),
        )  # fmt: skip


def launch_products(query: Tensor, key: Tensor, scores: Tensor) -> None:
    """Writes ``(b, p, i, j)``: all products of ``query`` (b, p, i, r) and ``key`` (b, p, j, r),
    both contiguous."""
    batch, heads, rows, rank = query.shape
    if scores.numel() == 0:
        return
    keys = key.shape[2]
    part = min(max(triton.next_power_of_2(rank), 16), 32)
    tile = 128
    tiles = triton.cdiv(rows, 64) * triton.cdiv(keys, tile)
    with on_device(query.device):
        kernels.product_kernel[(tiles, batch * heads)](
            query, key, scores, rows, keys, R=triton.cdiv(rank, part) * part, RANK=rank, PART=part,
            ROWS=64, C=tile, EVEN=keys % 16 == 0, num_warps=4, **_overlap(query.device),
        )  # fmt: skip


def launch_bilinear(query: Tensor, key: Tensor, candidates: Tensor, scores: Tensor) -> None:
    """Writes ``(b, p, i, c)``: products of ``query`` (b, p, i, r) and the candidates' rows of
    ``key`` (b, p, j, r), both contiguous."""
    batch, heads, rows, rank = query.shape
    if scores.numel() == 0:
        return
    columns = scores.shape[-1]
    part = min(triton.next_power_of_2(rank), 32)
    tiles = triton.cdiv(columns, _TILE)
    with on_device(query.device):
        kernels.bilinear_kernel[(tiles * rows * batch * heads,)](
            query, key, candidates, *_steps(candidates), candidates.stride(2), scores,
            rows, columns, key.shape[2], tiles, heads,
            R=triton.cdiv(rank, part) * part, RANK=rank, C=_TILE, PART=part, num_warps=2,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Network:
    """Weights of the MLP scorer, contiguous.

    Attributes:
        bias: ``(layers, h, r)``.
        hidden: ``(layers - 1, h, r, r)``.
        out: ``(h, r)``.
        gain: 0-dim.
    """

    bias: Tensor
    hidden: Tensor
    out: Tensor
    gain: Tensor


def launch_mlp(
    query: Tensor, key: Tensor, candidates: Tensor | None, network: Network, scores: Tensor
) -> None:
    """Writes ``(b, p, i, c)``: the MLP's scores from its first maps ``(b, h, i or j, r)``."""
    batch, heads, rows, rank = query.shape
    if scores.numel() == 0:
        return
    pattern_heads, columns = scores.shape[1], scores.shape[3]
    tile = 64 if rank <= 64 else 32
    tiles = triton.cdiv(columns, tile)
    listed = candidates is not None
    lists = (0, 0, 0) if candidates is None else (*_steps(candidates), candidates.stride(2))
    with on_device(query.device):
        kernels.mlp_kernel[(tiles * rows * batch * pattern_heads,)](
            query, key, candidates if listed else query, *lists,
            network.bias, network.hidden, network.out, network.gain, scores,
            rows, columns, key.shape[2], tiles, pattern_heads, heads,
            R=max(triton.next_power_of_2(rank), 16), RANK=rank, C=tile,
            LAYERS=network.bias.shape[0], SHARE=heads // pattern_heads, LISTS=listed, num_warps=4,
        )  # fmt: skip


def launch_kept_grad(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    counts: Tensor,
    indices: Tensor,
    offsets: Tensor,
    slots: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
) -> None:
    """Writes both towers' gradients from the kept tiles' ``(b, p, i, k)``; all contiguous."""
    batch, heads, rows, rank = query.shape
    keys, width = key.shape[2], indices.shape[3]
    if width == 0 or rows == 0 or keys == 0 or batch == 0:
        grad_query.zero_()
        grad_key.zero_()
        return
    r = min(triton.next_power_of_2(rank), 64)
    sizes = {"R": r, "RANK": rank, "C": 32, "num_warps": 2}
    with on_device(query.device):
        kernels.kept_query_grad_kernel[(rows * batch * heads, triton.cdiv(rank, r))](
            grad, key, indices, counts, grad_query, rows, keys, width, **sizes
        )
        kernels.kept_key_grad_kernel[(keys * batch * heads, triton.cdiv(rank, r))](
            grad, query, offsets, slots, grad_key, rows, keys, width, **sizes
        )


def launch_transpose(counts: Tensor, indices: Tensor, offsets: Tensor, slots: Tensor) -> None:
    """Writes ``PatternTranspose``'s tensors for contiguous lists.

    One bit per tile says whether it is kept; the bits above it in its column are its rank there.
    """
    batch, heads, rows, width = indices.shape
    columns = offsets.shape[2] - 1
    planes = batch * heads
    if rows == 0 or width == 0 or columns == 0 or planes == 0:
        offsets.zero_()
        return
    words, device = triton.cdiv(rows, 32), indices.device
    marks = torch.empty(planes, words, columns, dtype=torch.int32, device=device)
    before = torch.empty_like(marks)
    totals = torch.empty(planes, columns, dtype=torch.int32, device=device)
    w, c = triton.next_power_of_2(width), triton.next_power_of_2(columns)
    # One program for the columns of a plane while it is quick; otherwise few columns a program, so
    # that there are programs enough for the machine.
    whole = c * words <= 16384
    block = c if whole else 32
    step = min(triton.next_power_of_2(words), 8192 // block if whole else 64)
    with on_device(device):
        kernels.mark_kernel[(words * planes,)](
            indices, counts, marks, rows, columns, words, width,
            W=min(w, 64), C=min(c, 1024), num_warps=8, **_overlap(device),
        )  # fmt: skip
        kernels.rank_kernel[(triton.cdiv(columns, block), planes)](
            marks, before, totals, offsets, columns, words,
            WORDS=step, C=block, WHOLE=whole, num_warps=8 if whole else 4, **_overlap(device),
        )  # fmt: skip
        if not whole:
            kernels.offset_kernel[(planes,)](
                totals, offsets, columns, C=min(c, 2048), num_warps=4, **_overlap(device)
            )
        block = max(1024 // w, 1)
        kernels.place_kernel[(triton.cdiv(rows, block) * planes,)](
            indices, counts, marks, before, offsets, slots, rows, columns, words, width,
            ROWS=block, W=w, num_warps=min(max(block * w // 256, 1), 8), **_overlap(device),
        )  # fmt: skip


def launch_lattice(
    rule: Tensor,
    diagonal: Tensor,
    groups: tuple[tuple[int, int], ...],
    sinks: int,
    near: int,
    candidates: Tensor,
    forced: Tensor,
    limit: Tensor,
) -> None:
    """Writes ascending candidates ``(b, p, i, c)`` (-1: none) and how many are forced, and all."""
    batch, heads, rows, width = candidates.shape
    if candidates.numel() == 0:
        forced.zero_()
        limit.zero_()
        return
    c = max(triton.next_power_of_2(width), 16)
    with on_device(candidates.device):
        kernels.lattice_kernel[(rows * batch * heads,)](
            rule, _step(rule), diagonal, _step(diagonal), candidates, forced, limit,
            rows, heads, width, sinks, near, GROUPS=sum(groups, ()), C=c,
            num_warps=min(max(c // 128, 1), 8),
        )  # fmt: skip


def _step(x: Tensor) -> int:
    """Stride of the batch, 0 where all samples share one entry."""
    return x.stride(0) if x.shape[0] > 1 else 0


def _steps(x: Tensor | None) -> tuple[int, int]:
    """The same for batch and head."""
    if x is None:
        return 0, 0
    return _step(x), x.stride(1) if x.shape[1] > 1 else 0


def _per_sample(valid: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    return (stand_in, 0) if valid is None else (valid.view(torch.uint8), _step(valid))


def _overlap(device: torch.device) -> dict[str, bool]:
    """Arguments of kernels that are launched before their predecessor has ended.

    They are short: most of what they would take alone is the way from one to the next.
    """
    if kernels.INTERPRETED or capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
