"""ImportanceScorer against its formulas written out for one pair."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import ImportanceScorer
from dilated_attention_pytorch.scoring import scorer as module


def one_pair(scorer: ImportanceScorer, h: int, q: Tensor, k: Tensor) -> Tensor:
    """Score of one pair of summaries ``(s,)`` in head h, the MLP on their concatenation."""
    if scorer.kind == "mlp":
        q, k = (x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt() for x in (q, k))
        first = torch.cat([scorer.query_in[h], scorer.key_in[h]])
        x = F.gelu(torch.cat([q, k]) @ first + scorer.bias[0, h])
        for depth, weight in enumerate(scorer.hidden, start=1):
            x = F.gelu(x @ weight[h] + scorer.bias[depth, h])
        return (x * scorer.out[h]).sum() * scorer.gain
    q, k = q @ scorer.query_in[h], k @ scorer.key_in[h]
    for of_query, of_key in zip(scorer.query_tower, scorer.key_tower, strict=True):
        q, k = F.gelu(q) @ of_query[h], F.gelu(k) @ of_key[h]
    return (q * k).sum() * scorer.gain / math.sqrt(len(q))


def make(kind: str, num_layers: int = 2, heads: int = 4, **options: object) -> ImportanceScorer:
    torch.manual_seed(0)
    scorer = ImportanceScorer(
        6, heads, kind=kind, hidden_dim=5, num_layers=num_layers, **options
    ).double()
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return scorer


@pytest.mark.parametrize("kind", ["bilinear", "mlp"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize(("kv_heads", "share"), [(4, {}), (2, {}), (4, {"share_across_heads": True}),  # noqa: E501
                                                 (2, {"heads_per_pattern": 2})])  # fmt: skip
def test_equals_the_formula(kind: str, num_layers: int, kv_heads: int, share: dict) -> None:
    scorer = make(kind, num_layers, **share)
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    k = torch.randn(2, 7, kv_heads, 6, dtype=torch.float64)
    got = scorer(q, k)
    mean_of = scorer.heads_per_pattern
    assert got.shape == (2, 4 // mean_of, 3, 7)
    assert got.dtype == torch.float32
    for b in range(2):
        for i in range(3):
            for j in range(7):
                each = torch.stack([
                    one_pair(scorer, h, q[b, i, h], k[b, j, h // (4 // kv_heads)])
                    for h in range(4)
                ])  # fmt: skip
                expected = each.view(-1, mean_of).mean(1)
                torch.testing.assert_close(got[b, :, i, j].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bilinear", "mlp"])
@pytest.mark.parametrize("width", [2, 7])
@pytest.mark.parametrize("share", [False, True])
def test_candidates_are_columns_of_the_full_scores(kind: str, width: int, share: bool) -> None:
    scorer = make(kind, share_across_heads=share)
    q = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    k = torch.randn(2, 9, 2, 6, dtype=torch.float64)
    candidates = torch.randint(0, 9, (1, 1 if share else 4, 5, width))
    full = scorer(q, k)
    expected = full.gather(-1, candidates.expand(2, full.shape[1], 5, width))
    torch.testing.assert_close(scorer(q, k, candidates), expected)


@pytest.mark.parametrize("kind", ["bilinear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_score_in_float32(kind: str, dtype: torch.dtype) -> None:
    half = make(kind).to(dtype)
    wide = make(kind).to(dtype).float()
    q, k = torch.randn(2, 5, 4, 6).to(dtype), torch.randn(2, 9, 2, 6).to(dtype)
    assert torch.equal(half(q, k), wide(q.float(), k.float()))
    pairs = torch.cat([q[:, :5], q], -1)
    assert torch.equal(half(pairs), wide(pairs.float()))


@pytest.mark.parametrize("kind", ["bilinear", "mlp"])
def test_concatenated_pairs(kind: str) -> None:
    scorer = make(kind)
    q = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    k = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    got = scorer(torch.cat([q, k], -1))
    torch.testing.assert_close(got, scorer(q, k).diagonal(dim1=2, dim2=3))
    with pytest.raises(ValueError, match="summary_dim"):
        scorer(torch.cat([q, k, k], -1))


def test_mlp_in_chunks_is_the_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make("mlp")
    q = torch.randn(1, 9, 4, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 9, 4, 6, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        out = scorer(q, k)
        grads = torch.autograd.grad(out.square().sum(), [q, k, *scorer.parameters()])
        return [out, *grads]

    whole = run()
    monkeypatch.setattr(module, "_MLP_CHUNK", 4 * 9 * 5 * 2)
    for chunked, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(chunked, expected)


@pytest.mark.parametrize("kind", ["bilinear", "mlp"])
def test_sizes_shape_the_parameters(kind: str) -> None:
    scorer = ImportanceScorer(6, 3, kind=kind, hidden_dim=11, num_layers=3)
    assert scorer.query_in.shape == scorer.key_in.shape == (3, 6, 11)
    deep = scorer.query_tower if kind == "bilinear" else scorer.hidden
    assert [tuple(weight.shape) for weight in deep] == [(3, 11, 11)] * 2


@pytest.mark.parametrize("kind", ["bilinear", "mlp"])
def test_no_rows_and_no_keys(kind: str) -> None:
    scorer = ImportanceScorer(6, 2, kind=kind)
    assert scorer(torch.zeros(2, 0, 2, 6), torch.zeros(2, 3, 2, 6)).shape == (2, 2, 0, 3)
    assert scorer(torch.zeros(0, 4, 2, 6), torch.zeros(0, 3, 2, 6)).shape == (0, 2, 4, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kind", {"kind": "dot"}),
        ("summary_dim", {"summary_dim": 0}),
        ("num_heads", {"num_heads": 0}),
        ("hidden_dim", {"hidden_dim": 0}),
        ("num_layers", {"num_layers": 0}),
        ("heads_per_pattern", {"heads_per_pattern": 3}),
    ],
)
def test_bad_arguments(name: str, options: dict) -> None:
    with pytest.raises(ValueError, match=name):
        ImportanceScorer(**{"summary_dim": 6, "num_heads": 4, **options})


@pytest.mark.parametrize("name", ["query_summaries", "key_summaries"])
def test_bad_summaries(name: str) -> None:
    scorer = ImportanceScorer(6, 2)
    inputs = {"query_summaries": torch.zeros(1, 2, 2, 6), "key_summaries": torch.zeros(1, 2, 2, 6)}
    inputs[name] = torch.zeros(1, 2, 2, 5)
    with pytest.raises(ValueError, match=rf"{name}.*summary_dim=6"):
        scorer(**inputs)
