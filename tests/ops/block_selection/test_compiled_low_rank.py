"""The compiled CPU kernel of low-rank scores against the scorer in float64."""

import pytest
import torch

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.ops.block_selection import interface
from dilated_attention_pytorch.ops.block_selection.interface import low_rank_scores
from dilated_attention_pytorch.ops.block_sparse_attention.cpp import build_failure
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer
from dilated_attention_pytorch.selection.threshold import ThresholdTable

pytestmark = pytest.mark.skipif(build_failure() is not None, reason=f"no kernel: {build_failure()}")

# Heads, KV heads, head_dim, rank, stride, block, queries, keys, mask.
SHAPES = [
    (4, 2, 16, 8, 2, 32, 200, 200, {"causal": True}),
    (9, 3, 64, 32, 2, 32, 300, 300, {"causal": True}),
    (4, 4, 16, 16, 4, 16, 70, 100, {}),
    (4, 2, 24, 7, 1, 128, 300, 300, {"causal": True}),
    (2, 1, 16, 8, 2, 256, 600, 600, {"causal": True}),
    # One row, as a new token asks.
    (4, 2, 64, 32, 1, 32, 1, 300, {"causal": True, "query_offset": 299}),
    (4, 2, 16, 8, 2, 32, 200, 200, {"causal": True, "key_lengths": [200, 77]}),
    (4, 2, 16, 8, 2, 32, 200, 200, {"causal": True, "documents": True}),
    (4, 2, 16, 8, 2, 32, 60, 200, {"causal": True, "query_offset": [100, 140]}),
]


def problem(shape):
    (heads, kv_heads, dim), (n, m, settings) = shape[:3], shape[6:]
    generator = torch.Generator().manual_seed(0)
    query, key = (
        2 * torch.randn(2, length, h, dim, generator=generator)
        for length, h in ((n, heads), (m, kv_heads))
    )
    settings = dict(settings)
    if settings.pop("documents", False):
        settings["document_ids"] = torch.arange(n).ge(64).int().expand(2, n)
    for name in ("key_lengths", "query_offset"):
        if isinstance(settings.get(name), list):
            settings[name] = torch.tensor(settings[name])
    mask = AttentionMask(n, m, **settings)
    valid = None
    if mask.key_lengths is not None:
        valid = torch.arange(n) < mask.key_lengths[:, None]
    return query, key, mask, valid


def compiled(scorer, query, key, mask, valid, block, pattern_heads):
    token = torch.arange(0, mask.q_len, scorer.query_stride)
    spans = mask.spans(token)
    if valid is not None:
        spans = torch.where(valid[:, None, token], spans, 0)
    return low_rank_scores(
        query, key, scorer.query_map, scorer.key_map, spans, query_stride=scorer.query_stride,
        block_size=block, scale=scorer.scale, pattern_heads=pattern_heads, peaks=True,
        compiled=True,
    )  # fmt: skip


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_scores_and_peaks_are_those_of_float64(shape, share):
    heads, kv_heads, dim, rank, stride, block, *_ = shape
    share = share if heads % 2 == 0 else 3
    torch.manual_seed(0)
    scorer = LowRankScorer(
        heads, dim, kv_heads, rank=rank, query_stride=stride, heads_per_pattern=share
    ).double()
    query, key, mask, valid = problem(shape)
    want = scorer(query.double(), key.double(), mask, block, query_valid=valid, peaks=True)
    got = compiled(scorer, query, key, mask, valid, block, heads // share)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.float32
        # Of what is hardly looked at the logarithm says nothing.
        torch.testing.assert_close(
            x.double().clamp(min=-40), y.clamp(min=-40), rtol=1e-4, atol=5e-5
        )


@torch.no_grad()
def test_nobody_reads_what_is_padding_and_threads_change_nothing():
    query, key, mask, valid = problem(SHAPES[6])
    scorer = LowRankScorer(4, 16, 2, rank=8, query_stride=2)
    want = compiled(scorer, query, key, mask, valid, 32, 4)
    assert want[0].isfinite().all()
    query[1, 77:], key[1, 77:] = torch.nan, torch.nan
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            # Keys of other layouts, too.
            laid = key.transpose(1, 2).contiguous().transpose(1, 2)
            for x, y in zip(compiled(scorer, query, laid, mask, valid, 32, 4), want, strict=True):
                assert torch.equal(x, y)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_row():
    query, key, mask, _ = problem(SHAPES[0])
    scorer = LowRankScorer(4, 16, 2, rank=8, query_stride=2)
    clean = compiled(scorer, query, key, mask, None, 32, 4)
    query[0, 64, 1] = torch.nan
    spoilt = compiled(scorer, query, key, mask, None, 32, 4)
    for x, y in zip(spoilt, clean, strict=True):
        assert x[0, 1, 2].isnan().any()
        x[0, 1, 2] = y[0, 1, 2] = 0
        assert torch.equal(x, y)


def layer(backend, scope, **settings):
    torch.manual_seed(0)
    config = AdaptiveConfig(
        scorer="low_rank", block_size=16, hidden_dim=8, query_stride=2, base_sparsity=0.6,
        query_scope=scope, **settings,
    )  # fmt: skip
    made = BlockSparseAdaptive(
        adaptive_config=config, num_heads=4, head_dim=16, num_kv_heads=2, backend=backend
    ).eval()
    if config.budget == "threshold":
        made.set_thresholds(ThresholdTable((256,), (0.1,)))
    return made


SETTINGS = {
    "even": {"budget": "fixed"},
    "thresholds": {"budget": "threshold", "threshold_floor": 0.5, "peak_share": 0.25},
}


@pytest.mark.parametrize("scope", ["block", "past"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_a_layer_chooses_alike(settings, scope, monkeypatch):
    if scope == "past":
        settings = settings | ({"threshold_floor": 0.0} if "threshold_floor" in settings else {})
    calls = []
    whole = interface.masses_op
    monkeypatch.setattr(interface, "masses_op", lambda *a: calls.append(1) or whole(*a))
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 256, h, 16, generator=generator) for h in (4, 2, 2))
    outs = {}
    for backend in ("gather", "cpp"):
        made = layer(backend, scope, **settings)
        outs[backend] = made(q, k, v, is_causal=True)
        assert bool(calls) == (backend == "cpp")
    torch.testing.assert_close(outs["cpp"], outs["gather"], rtol=1e-4, atol=1e-5)


def test_it_is_left_alone_where_gradients_or_small_calls_are(monkeypatch):
    query = torch.randn(1, 64, 4, 16)
    reason = interface.compiled_unsupported_reason
    assert "gradient" in reason(query, "cpp", 1)
    with torch.no_grad():
        assert reason(query, "cpp", 1) is None
        assert "from 9,000,000" in reason(query, "auto", 1)
        assert reason(query, "auto", interface.AUTO_LOGITS) is None
        assert "auto" in reason(query, "gather", interface.AUTO_LOGITS)
        assert "float64" in reason(query.double(), "cpp", 1)
