"""Each selection kernel against PyTorch: compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import BlockPattern, ImportanceScorer, block_summaries
from dilated_attention_pytorch.candidates import CandidateRule, RowRange, count_forced, row_ranges
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.scoring.summaries import past_windows
from dilated_attention_pytorch.selection.budget import (
    FRACTION_BITS,
    content_complexity,
    round_budget,
    share_by_content,
    water_level_budget,
)
from dilated_attention_pytorch.selection.running_budget import running_budget
from dilated_attention_pytorch.selection.top_k import choose_top_k

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch.ops.block_selection import budgets
from dilated_attention_pytorch.ops.block_selection.budgets import (
    round_op,
    running_budget_op,
)
from dilated_attention_pytorch.ops.block_selection.choice import choose_op
from dilated_attention_pytorch.ops.block_selection.interface import (
    find_candidates,
    row_budget,
    summarise,
    summarise_both,
    transpose_lists,
)
from dilated_attention_pytorch.ops.block_selection.lattice import lattice_op
from dilated_attention_pytorch.ops.block_selection.scores import (
    bilinear_op,
    kept_op,
    products_op,
    towers_op,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("names", [("mean", "max"), ("min", "attention", "mean", "max"), ("max",)])
@pytest.mark.parametrize("length", [1, 50, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_summaries_and_their_gradients(names: tuple[str, ...], length: int, padded: bool) -> None:
    x, u = randn(2, length, 3, 20).requires_grad_(), randn(3, 20, seed=1).requires_grad_()
    valid = randn(2, length, seed=2) < 0.3 if padded else None
    got = summarise(x, 16, names, valid, u)
    wide = [t.detach().double().requires_grad_() for t in (x, u)]
    want = block_summaries(wide[0], 16, pooling=names, valid=valid, pool_query=wide[1])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    weight = randn(*want.shape, seed=3)
    inputs = [x, u] if "attention" in names else [x]
    found = torch.autograd.grad((got * weight).sum(), inputs)
    wanted = torch.autograd.grad((want * weight).sum(), wide[: len(inputs)])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_summaries_take_strides_and_leave_padding_alone() -> None:
    x = randn(2, 3, 40, 8).transpose(1, 2)
    valid = torch.arange(40, device=DEVICE)[None] < 20
    dirty = torch.where(valid[..., None, None], x, float("nan")).transpose(1, 2).contiguous()
    names = ("mean", "max", "min")
    want = block_summaries(x, 16, pooling=names, valid=valid)
    got = summarise(dirty.transpose(1, 2), 16, names, valid)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [(64, 32), (50, 70)])
@pytest.mark.parametrize("padded", [False, True])
def test_two_tensors_are_summarised_as_each_alone(lengths: tuple[int, int], padded: bool) -> None:
    names = ("max", "attention", "mean", "min")
    x, y = randn(2, lengths[0], 3, 20), randn(2, lengths[1], 2, 20, seed=1).transpose(0, 1)
    y = y.contiguous().transpose(0, 1)
    valid = [randn(2, n, seed=4) < 0.3 if padded else None for n in lengths]
    pools = randn(3, 20, seed=2), randn(2, 20, seed=3)
    with torch.no_grad():
        both = summarise_both(x, y, 16, names, (valid[0], valid[1]), pools)
        for got, t, v, u in zip(both, (x, y), valid, pools, strict=True):
            want = block_summaries(t, 16, pooling=names, valid=v, pool_query=u)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def window_starts(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Documents that begin at blocks: their token ids, and each block's first block."""
    blocks = -(-length // size)
    first = torch.tensor([[0, 0, 2, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 6]])[:, :blocks].to(DEVICE)
    return first.repeat_interleave(size, 1)[:, :length], first.int()


# Where windows begin and end is the same for all poolings: every length with all of them at once.
@pytest.mark.parametrize(("names", "length", "size"), [
    *((("min", "attention", "mean", "max"), length, size)
      for length, size in ((1, 16), (64, 16), (50, 16), (66, 12), (37, 64))),
    (("mean", "max"), 50, 16),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["plain", "padded", "documents"])
def test_windows_of_the_past_and_their_gradients(
    names: tuple[str, ...], length: int, size: int, kind: str
) -> None:
    x, u = randn(2, length, 3, 20).requires_grad_(), randn(3, 20, seed=1).requires_grad_()
    valid = randn(2, length, seed=2) < 0.3 if kind != "plain" else None
    ids = starts = None
    if kind == "documents":
        ids, starts = window_starts(length, size)
    wide = [t.detach().double().requires_grad_() for t in (x, u)]
    moved, kept = past_windows(wide[0], size, valid, ids)
    want = block_summaries(moved, size, pooling=names, valid=kept, pool_query=wide[1])
    got = summarise(x, size, names, valid, u, past=True, starts=starts)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    weight = randn(*want.shape, seed=3)
    inputs = [x, u] if "attention" in names else [x]
    found = torch.autograd.grad((got * weight).sum(), inputs)
    wanted = torch.autograd.grad((want * weight).sum(), wide[: len(inputs)])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    y = randn(2, 70, 2, 20, seed=4)
    both_valid = (valid, None if valid is None else randn(2, 70, seed=5) < 0.3)
    with torch.no_grad():
        first, second = summarise_both(
            x, y, size, names, both_valid, (u, u[:2]), past=True, starts=starts
        )
        torch.testing.assert_close(first, got)
        torch.testing.assert_close(second, summarise(y, size, names, both_valid[1], u[:2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_summaries_of_half_precision_are_not_rounded(dtype: torch.dtype) -> None:
    x = randn(1, 64, 2, 16).to(dtype).requires_grad_()
    got = summarise(x, 32, ("mean", "max"))
    torch.testing.assert_close(got, block_summaries(x.float(), 32), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(got.sum(), x)
    wide = x.detach().float().requires_grad_()
    (want,) = torch.autograd.grad(block_summaries(wide, 32).sum(), wide)
    torch.testing.assert_close(grad, want.to(dtype), rtol=0.01, atol=0.01)


def test_the_pool_query_learns_from_tokens_that_take_no_gradient() -> None:
    x, u = randn(1, 40, 2, 8), randn(2, 8, seed=1).requires_grad_()
    names = ("max", "attention")
    found, wanted = (
        torch.autograd.grad(f(x, 16, pooling=names, pool_query=u).square().sum(), u)[0]
        for f in (summarise, block_summaries)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_first_of_equal_extremes_takes_the_gradient() -> None:
    x = torch.zeros(1, 16, 1, 4, device=DEVICE, requires_grad=True)
    summarise(x, 16, ("max", "min")).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0].eq(2).all()
    assert x.grad[0, 1:].eq(0).all()


def intervals(rows: int, columns: int, *, forced: bool) -> Tensor:
    """Causal rows of ``columns`` key blocks, with a sink and the diagonal forced or nothing."""
    i = torch.arange(rows)
    end = (i + 1 + columns - rows).clamp(0, columns)
    nothing = torch.zeros_like(i)
    near = (end - 1, end) if forced else (nothing, nothing)
    parts = (nothing, end, nothing + int(forced), *near)
    return torch.stack(parts)[None].int().to(DEVICE)


def allowed_of(rule: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    low, end, sink, first, last = (x[..., None] for x in rule[:, None].unbind(2))
    j = torch.arange(columns, device=DEVICE)
    visible = (j >= low) & (j < end)
    must = visible & ((j < sink) | ((j >= first) & (j < last)))
    return visible & ~must, must


def lists_of(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Dense booleans, after checking that the lists ascend."""
    used = torch.arange(indices.shape[-1], device=DEVICE) < counts[..., None]
    dense = torch.zeros(*indices.shape[:3], columns + 1, dtype=torch.bool, device=DEVICE)
    dense.scatter_(3, torch.where(used, indices, columns).long(), True)
    steps = indices[..., 1:] > indices[..., :-1]
    assert (steps | ~used[..., 1:]).all()
    assert indices[~used].eq(0).all()
    return dense[..., :columns]


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("columns", [3, 33, 70, 304])
def test_choice_equals_top_k_with_ties_and_odd_values(forced: bool, columns: int) -> None:
    rows, plane = 6, (2, 2)
    # Few distinct values: many ties.
    scores = randn(*plane, rows, columns).mul(2).round()
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0], device=DEVICE)
    place = torch.arange(scores.numel(), device=DEVICE).view(scores.shape)
    scores = torch.where(place % 7 == 0, odd[place % 5], scores)
    rule = intervals(rows, columns, forced=forced)
    scored, must = allowed_of(rule, columns)
    budget = torch.arange(rows, device=DEVICE).int() * 2 + 1
    budget = budget.expand(*plane, rows).contiguous()
    counts, indices, kept, flags = choose_op(
        scores, None, rule, budget, None, None, 0, 0, columns, True
    )
    want = choose_top_k(scores, scored, (budget - must.sum(-1)).clamp(min=0), columns) | must
    assert torch.equal(lists_of(counts, indices, columns), want)
    used = torch.arange(columns, device=DEVICE) < counts[..., None]
    picked = scores.gather(-1, indices.long())
    assert torch.equal(kept[used].nan_to_num(7), picked[used].nan_to_num(7))
    assert torch.equal(flags.bool(), scored.expand_as(scores).gather(-1, indices.long()) & used)


def test_a_fixed_count_and_listed_candidates() -> None:
    columns = 40
    rule = intervals(4, columns, forced=True)
    listed = torch.tensor([0, 3, 4, 9, 30, 36, 37, 38, 39, -1, -1], device=DEVICE).int()
    listed = listed.expand(1, 1, 4, -1).contiguous()
    scores = randn(1, 2, 4, listed.shape[-1])
    counts, indices, *_ = choose_op(scores, listed, rule, None, None, None, 2, 0, 9, False)
    scored, must = allowed_of(rule, columns)
    at = listed.clamp(min=0).long()
    real = (listed >= 0).expand(scores.shape)
    free = scored.expand(1, 2, 4, -1).gather(-1, at.expand(scores.shape)) & real
    chosen = choose_top_k(scores, free, torch.full((1, 2, 4), 2, device=DEVICE), 2)
    want = torch.zeros(1, 2, 4, columns, dtype=torch.bool, device=DEVICE)
    want.scatter_(3, at.expand(scores.shape), chosen)
    forced = must.expand(1, 2, 4, -1).gather(-1, at.expand(scores.shape)) & real
    every = torch.zeros_like(want).scatter_(3, at.expand(scores.shape).where(forced, 0), True)
    assert torch.equal(lists_of(counts, indices, columns), want | (every & must))


def test_noise_samples_like_the_softmax_and_random_blocks_are_uniform() -> None:
    # Interpreted programs take 0.1 s each.
    rows, far = (2000, 0.04) if DEVICE.type == "cuda" else (40, 0.25)
    share = torch.tensor([0.5, 0.25, 0.125, 0.125], device=DEVICE)
    scores = share.log().expand(1, 1, rows, 4).contiguous()
    rule = torch.tensor([0, 4, 0, 0, 0]).view(1, 5, 1).expand(1, 5, rows)
    rule = rule.int().contiguous().to(DEVICE)
    seed, one = torch.tensor(5, device=DEVICE), torch.ones((), device=DEVICE)
    counts, indices, *_ = choose_op(scores, None, rule, None, seed, one, 1, 0, 1, False)
    assert counts.eq(1).all()
    found = torch.bincount(indices.flatten(), minlength=4) / rows
    torch.testing.assert_close(found, share, atol=far, rtol=0)
    # No scored block, one random one: each block is as likely.
    _, indices, *_ = choose_op(scores, None, rule, None, seed, one, 0, 1, 1, False)
    uniform = torch.bincount(indices.flatten(), minlength=4) / rows
    torch.testing.assert_close(uniform, torch.full_like(share, 0.25), atol=far, rtol=0)
    again = choose_op(scores, None, rule, None, seed, one, 0, 1, 1, False)[1]
    other = choose_op(scores, None, rule, None, seed + 1, one, 0, 1, 1, False)[1]
    assert torch.equal(indices, again)
    assert not torch.equal(indices, other)


@pytest.mark.parametrize("rank", [5, 48, 200])
def test_products_of_listed_candidates_and_of_kept_tiles(rank: int) -> None:
    q, k = randn(2, 2, 5, rank).requires_grad_(), randn(2, 2, 7, rank, seed=1).requires_grad_()
    dense = randn(2, 2, 5, 7, seed=2) < 0.2
    pattern = BlockPattern.from_dense(dense, q_len=5, kv_len=7, block_size=1)
    listed = torch.where(pattern.slot_used(), pattern.kv_indices, -1)
    products = bilinear_op(q.detach(), k.detach(), listed)
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    want = (wide[0] @ wide[1].transpose(-1, -2)).gather(-1, pattern.kv_indices.long())
    want = want.where(pattern.slot_used(), 0)
    torch.testing.assert_close(products.double(), want, rtol=1e-5, atol=1e-4)
    turned = pattern.transpose()
    kept = kept_op(
        q, k, products, pattern.kv_num_blocks, pattern.kv_indices, turned.offsets, turned.slots
    )
    weight = randn(*kept.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad((kept * weight).sum(), (q, k)),
        torch.autograd.grad((want * weight).sum(), wide),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [5, 48])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 130)])
def test_products_of_all_pairs(rank: int, rows: int, columns: int) -> None:
    q, k = randn(2, 2, rows, rank), randn(2, 2, columns, rank, seed=1)
    want = q.double() @ k.double().transpose(-1, -2)
    torch.testing.assert_close(products_op(q, k).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "density"), [
    (1, 1, 1.0), (40, 70, 0.3), (33, 5, 0.9), (64, 64, 0.0), (65, 130, 0.1),
    # More than one program takes the columns of a plane.
    (530, 540, 0.02),
])  # fmt: skip
def test_transpose_equals_sorting(rows: int, columns: int, density: float) -> None:
    dense = torch.rand(2, 2, rows, columns, generator=torch.Generator().manual_seed(0)) < density
    pattern = BlockPattern.from_dense(dense, q_len=rows, kv_len=columns, block_size=1)
    want = pattern.transpose()
    got = transpose_lists(pattern.to(DEVICE))
    assert torch.equal(got.offsets.cpu(), want.offsets)
    for b in range(2):
        for h in range(2):
            end = int(want.offsets[b, h, -1])
            assert torch.equal(got.slots[b, h, :end].cpu(), want.slots[b, h, :end])


RULES = [
    {"causal": False},
    {"causal": True},
    {"causal": True, "num_local_blocks": 2, "num_sink_blocks": 1},
    {"causal": False, "num_local_blocks": 1, "num_sink_blocks": 2},
]


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize(("padded", "diagonal"), [(False, True), (True, False), (True, True)])
def test_lattice_lists_what_the_enumeration_allows(
    settings: dict, diagonal: bool, padded: bool
) -> None:
    if settings["causal"] and not diagonal:
        pytest.skip("causal masks have a diagonal")
    lengths = torch.tensor([28, 13], device=DEVICE) if padded else None
    mask = AttentionMask(28, 28, settings["causal"], 0, lengths)
    rows = row_ranges(mask, (2, 2), has_diagonal=diagonal, device=DEVICE)
    rule = CandidateRule(
        num_heads=3, num_key_blocks=14, block_size=2, segment_lengths=(8, 24, 28),
        dilation_rates=(1, 2, 3), **settings,
    )  # fmt: skip
    segments, rates = zip(*rule.groups(), strict=True)
    candidates, forced, limit = lattice_op(
        rule.intervals(rows), rows.diagonal_first[:, 0].contiguous(), list(segments), list(rates),
        3, rule.num_sink_blocks, rule.near_width(rows),
    )  # fmt: skip
    assert candidates.shape[-1] == rule.width(rows)
    built = rule.build(rows)
    assert built.indices is not None
    want = torch.zeros(*limit.shape, 15, dtype=torch.bool, device=DEVICE)
    visible = built.scored | built.forced
    index = torch.where(visible, built.indices, 14).expand(*limit.shape, -1)
    want.scatter_(3, index, True)
    assert torch.equal(lists_of(limit, candidates.where(candidates >= 0, 0), 14), want[..., :14])
    assert torch.equal(forced, built.forced.sum(-1).int().expand_as(forced))


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize("diagonal", [False, True])
def test_counting_forced_blocks(settings: dict, diagonal: bool) -> None:
    mask = AttentionMask(36, 30, settings["causal"], -6 if settings["causal"] else 0)
    rows = row_ranges(mask, (2, 2), has_diagonal=diagonal, device=DEVICE)
    rule = CandidateRule(num_heads=1, num_key_blocks=15, block_size=2, **settings)
    forced, limit = count_forced(rule.intervals(rows))
    built = rule.build(rows)
    assert torch.equal(forced, built.forced.sum(-1).int())
    assert torch.equal(limit, (built.forced | built.scored).sum(-1).int())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (1, 2)])
@pytest.mark.parametrize("kind", ["plain", "lengths", "documents"])
@pytest.mark.parametrize("even", [None, 0.4])
def test_budgets_equal_the_formulas(
    causal: bool, heads: int, kv_heads: int, kind: str, even: float | None
) -> None:
    blocks, lengths, ids = 40, None, None
    if kind == "lengths":
        lengths = torch.tensor([40, 23], device=DEVICE)
    if kind == "documents":
        ids = torch.tensor([[0] * 25 + [1] * 15, [0] * 3 + [1] * 30 + [-1] * 7], device=DEVICE)
    mask = AttentionMask(blocks, blocks, causal, 0, lengths, None if ids is None else ids.int())
    rows = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
    rule = CandidateRule(
        num_heads=heads, num_key_blocks=blocks, block_size=1, causal=causal, num_sink_blocks=1
    )
    spans = rule.intervals(rows)
    forced, limit = count_forced(spans)
    # Alike in parts, so that the complexity varies.
    means = randn(2, kv_heads, blocks, 12) + 2 * randn(2, kv_heads, 1, 12, seed=1)
    gain = torch.linspace(0.7, 2.0, heads, device=DEVICE).requires_grad_()
    offset = torch.linspace(0.1, 0.6, heads, device=DEVICE).requires_grad_()
    base = torch.tensor(0.7, device=DEVICE)
    rounded, exact = row_budget(
        rule, rows, spans, forced, limit, base, batch=2, means=means, gain=gain, offset=offset,
        even=None if even is None else torch.tensor(even, device=DEVICE),
    )  # fmt: skip
    complexity = content_complexity(means.transpose(1, 2), rows)
    if heads == 1:
        complexity = complexity.mean(1, keepdim=True)
    elif heads > kv_heads:
        complexity = complexity.repeat_interleave(heads // kv_heads, 1)
    factor = (offset[:, None] + gain[:, None] * complexity).clamp(1e-3, 2)
    keep = share_by_content(1 - base, factor)
    want = water_level_budget(keep, forced, limit, rows, blocks)
    torch.testing.assert_close(exact, want, rtol=1e-4, atol=1e-4)
    part = exact if even is None else forced + torch.tensor(even, device=DEVICE) * (exact - forced)
    assert torch.equal(rounded, round_budget(part, rows))
    weight = randn(*want.shape, seed=2)
    found = torch.autograd.grad((exact * weight).sum(), (gain, offset))
    wanted = torch.autograd.grad((want * weight).sum(), (gain, offset))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@functools.cache
def causal_rows(heads: int, kind: str) -> tuple[RowRange, Tensor, Tensor, Tensor]:
    """Rows over 40 blocks, their intervals, and how many blocks are forced and allowed."""
    blocks, lengths, ids, queries = 40, None, None, 40
    if kind == "lengths":
        lengths = torch.tensor([40, 23], device=DEVICE)
    if kind == "documents":
        ids = torch.tensor([[0] * 25 + [1] * 15, [0] * 3 + [1] * 30 + [-1] * 7], device=DEVICE)
    if kind == "offset":
        queries = 33
    mask = AttentionMask(
        queries, blocks, True, blocks - queries, lengths, None if ids is None else ids.int()
    )
    rows = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
    lattice = {"segment_lengths": (8, 40), "dilation_rates": (1, 4)} if kind == "segments" else {}
    rule = CandidateRule(
        num_heads=heads, num_key_blocks=blocks, block_size=1, causal=True, num_sink_blocks=1,
        num_local_blocks=1, **lattice,
    )  # fmt: skip
    spans = rule.intervals(rows)
    _, forced, limit = find_candidates(rule, rows, spans)
    return rows, spans, forced, limit


@pytest.mark.parametrize(("content", "even"), [(True, None), (True, 0.3), (False, None)])
@pytest.mark.parametrize(
    ("kind", "heads", "kv_heads"),
    [
        *(("plain", *heads) for heads in ((4, 2), (2, 2), (1, 2))),
        *((kind, 4, 2) for kind in ("lengths", "documents", "segments", "offset")),
        ("segments", 1, 2),
    ],
)
def test_running_budgets_equal_the_formulas(
    heads: int, kv_heads: int, kind: str, content: bool, even: float | None
) -> None:
    """In every bit, from the complexity that the kernel found."""
    rows, spans, forced, limit = causal_rows(heads, kind)
    queries, blocks = spans.shape[-1], 40
    means = randn(2, kv_heads, blocks, 12) + 2 * randn(2, kv_heads, 1, 12, seed=1)
    gain = torch.linspace(0.7, 2.0, heads, device=DEVICE).requires_grad_()
    offset = torch.linspace(0.1, 0.6, heads, device=DEVICE).requires_grad_()
    base = torch.tensor(0.85, device=DEVICE)
    part = None if even is None else torch.tensor(even, device=DEVICE)
    exact, _, complexity, whole = running_budget_op(
        means if content else None, gain if content else None, offset if content else None, base,
        spans, rows.diagonal_first[:, 0].contiguous(), rows.document[:, 0].contiguous(),
        forced, limit, part, 2, heads, True, FRACTION_BITS,
    )  # fmt: skip
    keep = (1 - base).expand(2, heads, queries)
    if content:
        expected = content_complexity(means.transpose(1, 2), rows, past_only=True)
        if heads == 1:
            expected = expected.mean(1, keepdim=True)
        elif heads > kv_heads:
            expected = expected.repeat_interleave(heads // kv_heads, 1)
        torch.testing.assert_close(complexity, expected, rtol=1e-5, atol=1e-5)
        factor = (offset[:, None] + gain[:, None] * complexity.detach()).clamp(1e-3, 2)
        keep = share_by_content(keep, factor)
    want, want_whole = running_budget(keep, forced, limit, rows, part)
    assert torch.equal(exact, want)
    assert torch.equal(whole, want_whole)
    if content:
        weight = randn(*want.shape, seed=2)
        found = torch.autograd.grad((exact * weight).sum(), (gain, offset))
        wanted = torch.autograd.grad((want * weight).sum(), (gain, offset))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 33, 70])
def test_running_budgets_over_several_chunks_and_at_bounds(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that earn nothing, exactly a bound, or more than their candidates; many documents."""
    monkeypatch.setattr(budgets, "MAX_CHUNK", 32)
    cut = torch.arange(rows) // 7 * (torch.arange(rows) % 50 < 30)
    ids = cut.cummax(0).values[None].int().to(DEVICE)
    for documents in (None, ids):
        mask = AttentionMask(rows, rows, True, 0, None, documents)
        ranges = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
        rule = CandidateRule(num_heads=3, num_key_blocks=rows, block_size=1, causal=True)
        spans = rule.intervals(ranges)
        _, forced, limit = find_candidates(rule, ranges, spans)
        for share in (0.0, 0.5, 1.0, 0.037):
            # A gain of 0: every row has the same share, many exactly at a bound.
            gain = torch.zeros(3, device=DEVICE).requires_grad_()
            offset = torch.tensor([share, 1.0, 1.7], device=DEVICE).requires_grad_()
            base = torch.tensor(0.5, device=DEVICE)
            means = randn(1, 3, rows, 8)
            exact, _, _, whole = running_budget_op(
                means, gain, offset, base, spans, ranges.diagonal_first[:, 0].contiguous(),
                ranges.document[:, 0].contiguous(), forced, limit, None, 1, 3, True, FRACTION_BITS,
            )  # fmt: skip
            factor = offset[:, None] + gain[:, None] * torch.ones(1, 3, rows, device=DEVICE)
            keep = share_by_content(1 - base, factor.clamp(1e-3, 2))
            want, want_whole = running_budget(keep, forced, limit, ranges)
            assert torch.equal(exact, want)
            assert torch.equal(whole, want_whole)
            found, wanted = (torch.autograd.grad(x.sum(), offset)[0] for x in (exact, want))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_a_budget_without_content() -> None:
    mask = AttentionMask(30, 30, True)
    rows = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
    rule = CandidateRule(num_heads=2, num_key_blocks=30, block_size=1, causal=True)
    spans = rule.intervals(rows)
    forced, limit = count_forced(spans)
    base = torch.tensor(0.8, device=DEVICE)
    rounded, exact = row_budget(rule, rows, spans, forced, limit, base, batch=3)
    keep = torch.full((3, 2, 30), 0.2, device=DEVICE)
    want = water_level_budget(keep, forced, limit, rows, 30)
    torch.testing.assert_close(exact, want)
    assert torch.equal(rounded, round_budget(exact, rows))


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (70, 1), (2049, 1), (70, 3)])
def test_rounding(rows: int, heads: int) -> None:
    exact = torch.rand(2, heads, rows, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 9
    exact[0, 0, ::3] = exact[0, 0, ::3].round() + 0.5
    mask = AttentionMask(rows, rows)
    ranges = row_ranges(mask, (1, 1), has_diagonal=True, device=DEVICE)
    assert torch.equal(round_op(exact, FRACTION_BITS), round_budget(exact, ranges))


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_towers_equal_the_scorers(share: int, kv_heads: int) -> None:
    scorer = ImportanceScorer(24, 4, hidden_dim=8, heads_per_pattern=share).double().to(DEVICE)
    with torch.no_grad():
        scorer.gain.fill_(1.7)
        queries, keys = randn(2, 37, 4, 24).double(), randn(2, 5, kv_heads, 24).double()
        want = scorer.encode_queries(queries), scorer.encode_keys(keys)
        scorer.float()
        found = towers_op(
            queries.float().transpose(1, 2), keys.float().transpose(1, 2),
            scorer.query_in, scorer.key_in, scorer.gain, 1 / (8**0.5 * share), share,
        )  # fmt: skip
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
