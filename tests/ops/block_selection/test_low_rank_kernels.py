"""The low-rank kernels against the scorer in float64: compiled on a GPU, else interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch.ops.block_selection import low_rank
from dilated_attention_pytorch.ops.block_selection.interface import low_rank_scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Mass is compared, not its logarithm: what rounding moves is a share of the mass.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 0.02}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def documents(*lengths: int) -> Tensor:
    """Numbers ascending, a gap behind them -1."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return number.int().to(DEVICE)[None]


MASKS = {
    "plain": {},
    "one block": {"q_len": 10, "kv_len": 10},
    "not causal": {"causal": False},
    "cached prefix": {"q_len": 40, "query_offset": 60},
    "negative offset": {"q_len": 100, "kv_len": 60, "query_offset": -40},
    "lengths": {"key_lengths": (70, 33)},
    "offset per sample": {"q_len": 40, "query_offset": (50, 7), "key_lengths": (90, 47)},
}


def mask_of(
    q_len: int = 100, kv_len: int = 100, causal: bool = True, **others: Any
) -> AttentionMask:
    made = {k: ints(*v) if isinstance(v, tuple) else v for k, v in others.items()}
    return AttentionMask(q_len, kv_len, causal, **made)


def case(
    mask: AttentionMask, dtype: torch.dtype, *, heads: int = 4, dim: int = 16, rank: int = 8,
    stride: int = 4, share: int = 1, batch: int = 2,
) -> tuple[Tensor, Tensor, LowRankScorer]:  # fmt: skip
    torch.manual_seed(0)
    query = 2 * torch.randn(batch, mask.q_len, heads, dim)
    key = torch.randn(batch, mask.kv_len, 2, dim) + 3 * torch.randn(dim)
    scorer = LowRankScorer(
        heads, dim, 2, rank=rank, query_stride=stride, scale=0.3, heads_per_pattern=share
    )
    with torch.no_grad():
        # Two different maps.
        scorer.key_map.add_(0.1 * torch.randn_like(scorer.key_map))
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype), scorer.to(DEVICE)


def found(
    query: Tensor, key: Tensor, scorer: LowRankScorer, mask: AttentionMask, size: int,
    valid: Tensor | None = None, peaks: bool = True,
) -> Tensor:  # fmt: skip
    """Mass and peaks, ``(2, b, h, i, j)``."""
    stride = scorer.query_stride
    sampled = torch.arange(0, mask.q_len, stride, device=DEVICE)
    spans = mask.spans(sampled)
    if valid is not None:
        spans = torch.where(valid[:, None, sampled], spans, 0)
    scores, *rest = low_rank_scores(
        query, key, scorer.query_map.detach(), scorer.key_map.detach(), spans, query_stride=stride,
        block_size=size, scale=scorer.scale,
        pattern_heads=scorer.num_heads // scorer.heads_per_pattern, peaks=peaks,
    )  # fmt: skip
    return torch.stack([scores.exp(), *rest])


def wanted(
    query: Tensor, key: Tensor, scorer: LowRankScorer, mask: AttentionMask, size: int,
    valid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The scorer's formula in float64, all logits at once."""
    stride = scorer.query_stride
    q = torch.einsum("bnhd,hdr->bhnr", query[:, ::stride].double(), scorer.query_map.double())
    k = key.double().repeat_interleave(query.shape[2] // key.shape[2], 2)
    k = torch.einsum("bmhd,hdr->bhmr", k, scorer.key_map.double())
    row = torch.arange(0, mask.q_len, stride, device=DEVICE)
    column = torch.arange(mask.kv_len, device=DEVICE)
    seen = mask.tokens(row.view(1, 1, -1, 1), column.view(1, 1, 1, -1))
    logits = (q @ k.mT * scorer.scale).masked_fill(~seen, -torch.inf)
    p = logits.softmax(-1).nan_to_num(0.0)
    counts = seen.any(-1)
    if valid is not None:
        counts = counts & valid[:, None, ::stride]
    p = p * counts[..., None]
    blocks = [-(-n // size) for n in (mask.q_len, mask.kv_len)]
    out = p.new_zeros(2, *p.shape[:2], *blocks)
    for i in range(blocks[0]):
        rows = slice(i * size // stride, (i + 1) * size // stride)
        weight = counts[:, :, rows].sum(-1).clamp(min=1)
        for j in range(blocks[1]):
            tile = p[:, :, rows, j * size : (j + 1) * size]
            out[0, :, :, i, j] = tile.sum((-2, -1)) / weight
            out[1, :, :, i, j] = tile.sum(-1).amax(-1)
    mass, highest = out.unflatten(2, (-1, scorer.heads_per_pattern))
    return torch.stack([mass.mean(2), highest.amax(2)]).detach()


def check(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Means of some queries are rounded less than the largest of them."""
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MASKS)
def test_mass_under_every_mask(name: str, dtype: torch.dtype) -> None:
    mask = mask_of(**MASKS[name])
    query, key, scorer = case(mask, dtype)
    got = found(query, key, scorer, mask, 16).double()
    want = wanted(query, key, scorer, mask, 16)
    check(got, want, dtype)


@pytest.mark.parametrize("sizes", [(100,), (16, 40, 32, 12), (64, 36)])
def test_packed_documents(sizes: tuple[int, ...]) -> None:
    mask = AttentionMask(100, 100, True, document_ids=documents(*sizes))
    query, key, scorer = case(mask, torch.float32, batch=1)
    got = found(query, key, scorer, mask, 4).double()
    check(got, wanted(query, key, scorer, mask, 4))


def test_padding_counts_for_nothing_and_may_hold_anything() -> None:
    mask = mask_of(key_lengths=(70, 33))
    query, key, scorer = case(mask, torch.float32)
    valid = torch.arange(100, device=DEVICE) < ints(70, 33)[:, None]
    want = wanted(query, key, scorer, mask, 16, valid)
    query[~valid], key[~valid] = float("nan"), float("nan")
    got = found(query, key, scorer, mask, 16, valid).double()
    check(got, want)
    assert (want[:, 1, :, 3:] == 0).all()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (16, {"share": 2}),
        (16, {"share": 4}),
        (64, {"stride": 1}),
        (64, {"stride": 64, "rank": 3}),
        (24, {"stride": 3, "dim": 20}),
        (8, {"stride": 2}),
        (128, {}),
    ],
)
def test_sizes_and_shared_patterns(size: int, options: dict[str, int]) -> None:
    mask = mask_of()
    query, key, scorer = case(mask, torch.float32, **options)
    got = found(query, key, scorer, mask, size).double()
    check(got, wanted(query, key, scorer, mask, size))


def test_without_peaks_the_scores_are_the_same() -> None:
    mask = mask_of()
    query, key, scorer = case(mask, torch.float32)
    both = found(query, key, scorer, mask, 16)
    assert torch.equal(found(query, key, scorer, mask, 16, peaks=False), both[:1])


def test_strides_are_free() -> None:
    mask = mask_of()
    query, key, scorer = case(mask, torch.float32)
    want = found(query, key, scorer, mask, 16)
    query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    assert torch.equal(found(query, key, scorer, mask, 16), want)


def test_rows_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of()
    query, key, scorer = case(mask, torch.float32)
    want = found(query, key, scorer, mask, 16)
    monkeypatch.setattr(low_rank, "_WORKSPACE", 8 * 7 * 4 * 2)
    # Products of other shapes are rounded in another order on some processors.
    torch.testing.assert_close(found(query, key, scorer, mask, 16), want, rtol=1e-5, atol=1e-5)


def test_nothing_but_the_scores_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces and outputs that start as NaN give the same numbers."""
    mask = mask_of(key_lengths=(70, 33))
    query, key, scorer = case(mask, torch.float32)
    want = found(query, key, scorer, mask, 16)
    empty, new_empty = torch.empty, Tensor.new_empty

    def dirty(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: dirty(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda t, *a, **k: dirty(new_empty(t, *a, **k)))
    assert torch.equal(found(query, key, scorer, mask, 16), want)
