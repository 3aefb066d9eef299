"""Rows keep their highest peaks besides what reaches the threshold: by a brute force in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import observe_patterns
from dilated_attention_pytorch.selection.threshold import ThresholdTable, calibrate_threshold
from nn.test_token_selection import inputs_of

HEADS, KV_HEADS, DIM, SIZE, STRIDE, TOKENS = 4, 2, 8, 8, 2, 110


def make(**changes: Any) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    settings = {
        "scorer": "low_rank", "hidden_dim": 4, "budget": "threshold", "block_size": SIZE,
        "query_stride": STRIDE, "base_sparsity": 0.5, "num_sink_blocks": 1,
        "peak_share": 0.5, "query_scope": "block",
    }  # fmt: skip
    config = AdaptiveConfig(**{**settings, **changes})
    layer = BlockSparseAdaptive(None, None, HEADS, DIM, config, num_kv_heads=KV_HEADS)
    layer.set_thresholds(ThresholdTable((TOKENS,), (0.3,)))
    return layer.double().eval()


def tokens(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        3 * torch.randn(batch, TOKENS, heads, DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def chosen(layer: BlockSparseAdaptive, *inputs: Tensor, **call: Any) -> Tensor:
    found: list[Tensor] = []
    with torch.no_grad(), observe_patterns([layer], lambda _, p: found.append(p.to_dense())):
        layer(*inputs, is_causal=True, **call)
    return found[0]


def expected(layer: BlockSparseAdaptive, query: Tensor, key: Tensor) -> Tensor:
    """One head and row after the other, from shares of single queries."""
    config, heads = layer.config, layer.pattern_heads
    share, blocks = HEADS // heads, math.ceil(TOKENS / SIZE)
    maps = [x.detach().double() for x in (layer.scorer.query_map, layer.scorer.key_map)]
    out = torch.zeros(len(query), heads, blocks, blocks, dtype=torch.bool)
    for b in range(len(query)):
        for head in range(HEADS):
            q = query[b, :, head] @ maps[0][head] * DIM**-0.5
            k = key[b, :, head * KV_HEADS // HEADS] @ maps[1][head]
            logits = (q @ k.T).masked_fill(torch.ones(TOKENS, TOKENS).triu(1) > 0, -torch.inf)
            p = torch.nn.functional.pad(logits.softmax(-1), (0, blocks * SIZE - TOKENS))
            p = p.unflatten(-1, (blocks, SIZE)).sum(-1)
            if head % share == 0:
                of_heads = []
            of_heads.append(p)
            if len(of_heads) < share:
                continue
            for i in range(blocks):
                if config.query_scope == "past":
                    own = [t for t in range(i * SIZE, (i - 1) * SIZE, -STRIDE) if t >= 0]
                    length = i * SIZE + 1
                else:
                    own, length = list(range(i * SIZE, min((i + 1) * SIZE, TOKENS), STRIDE)), TOKENS
                rows = torch.stack(of_heads)[:, own].flatten(0, 1)
                forced = {0, i}
                even = max(0.5 * (i + 1) - len(forced), 0)
                quota = math.floor(config.peak_share * even + (2 * (head // share) + 1) / 2 / heads)
                free = [j for j in range(i + 1) if j not in forced]
                ranked = sorted(free, key=lambda j: (-float(rows[:, j].max()), j))
                kept = forced | set(ranked[:quota])
                threshold = layer.threshold_table().at(length)
                kept |= {j for j in free if float(rows[:, j].mean()) >= threshold}
                out[b, head // share, i, sorted(kept)] = True
    return out


@pytest.mark.parametrize("scope", ["block", "past"])
@pytest.mark.parametrize("changes", [{}, {"share_within_kv_group": True}, {"peak_share": 1.0}])
def test_choices_are_those_of_the_brute_force(scope: str, changes: dict[str, Any]) -> None:
    layer, inputs = make(query_scope=scope, **changes), tokens()
    want = expected(layer, *inputs[:2])
    assert torch.equal(chosen(layer, *inputs), want)
    # Peaks and means both decide: neither alone gives the same.
    without = chosen(make(query_scope=scope, **{**changes, "peak_share": 0.0}), *inputs)
    assert bool((without <= want).all())
    assert int(want.sum()) > int(without.sum()) + 20
    if "peak_share" not in changes:
        layer.set_thresholds(ThresholdTable((TOKENS,), (99.0,)))
        assert int(chosen(layer, *inputs).sum()) < int(want.sum())


@pytest.mark.parametrize("scope", ["block", "past"])
def test_a_needle_of_one_query_is_kept(scope: str) -> None:
    """Thresholds on the mean leave it out, whatever the rest of the row looks at."""
    query, key, value = (0.1 * x for x in tokens(1))
    needle = torch.zeros(DIM, dtype=torch.float64).index_fill(0, torch.tensor([3]), 8.0)
    query[:, 96], key[:, 37] = needle, needle
    found = {}
    for share in (0.0, 0.5):
        layer = make(query_scope=scope, peak_share=share, hidden_dim=DIM, query_stride=1)
        with torch.no_grad():
            for x in (layer.scorer.query_map, layer.scorer.key_map):
                x.copy_(torch.eye(DIM))
        found[share] = chosen(layer, query, key, value)[:, :, 96 // SIZE, 37 // SIZE]
    assert not found[0.0].any()
    assert found[0.5].all()


def test_nothing_of_a_later_block_counts() -> None:
    """With the past alone no later token; those of the own block may with ``"block"``."""
    for scope, start in (("block", 64), ("past", 65), ("past", 70)):
        layer, inputs = make(query_scope=scope), tokens()
        want = chosen(layer, *inputs)
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, start:] = 7.0
        rows = math.ceil(start / SIZE)
        got = chosen(layer, *changed)
        assert torch.equal(got[:, :, :rows], want[:, :, :rows])
        assert not torch.equal(got, want)


@pytest.mark.parametrize("scope", ["block", "past"])
def test_samples_and_documents_do_not_see_each_other(scope: str) -> None:
    layer, inputs = make(query_scope=scope), tokens()
    lengths = torch.tensor([TOKENS, 61])
    got = chosen(layer, *inputs, key_lengths=lengths)[1:, :, :8, :8]
    assert torch.equal(got, chosen(layer, *(x[1:, :61] for x in inputs)))
    documents = torch.tensor([[0, 48, TOKENS]] * 2)
    got = chosen(layer, *inputs, cu_seqlens=documents)
    assert torch.equal(got[:, :, :6, :6], chosen(layer, *(x[:, :48] for x in inputs)))
    assert torch.equal(got[:, :, 6:14, 6:14], chosen(layer, *(x[:, 48:] for x in inputs)))


@pytest.mark.parametrize("floor", [0.0, 0.8])
def test_a_calibration_counts_what_peaks_keep(floor: float) -> None:
    layer, inputs = make(threshold_floor=floor, base_sparsity=0.6), tokens()
    sample = layer.threshold_sample(inputs_of(layer, *inputs[:2]))
    for sparsity in (0.5, 0.6):
        found = calibrate_threshold([sample], sparsity)
        layer.set_thresholds(ThresholdTable((TOKENS,), (found,)))
        kept = chosen(layer, *inputs)
        assert float(kept.sum()) == pytest.approx((1 - sparsity) * sample.allowed, abs=2)


def test_a_floor_takes_what_peaks_keep_for_a_part_of_it() -> None:
    """As many blocks as without peaks where neither threshold nor peaks ask for more."""
    found = []
    for share in (0.0, 0.4):
        layer = make(threshold_floor=0.9, peak_share=share, num_sink_blocks=0)
        layer.set_thresholds(ThresholdTable((TOKENS,), (99.0,)))
        found.append(chosen(layer, *(0.3 * x for x in tokens())))
    # Rows see up to 14 blocks, of which a late row alone has a right to seven.
    early = slice(0, 10)
    assert torch.equal(found[0][:, :, early].sum(-1), found[1][:, :, early].sum(-1))
    assert not torch.equal(found[0][:, :, early], found[1][:, :, early])


def test_training_teaches_what_peaks_keep_too() -> None:
    layer = make(num_explore_blocks=0).train()
    layer.set_thresholds(ThresholdTable((TOKENS,), (99.0,)))
    inputs = [x.requires_grad_() for x in tokens()]
    layer(*inputs, is_causal=True).square().sum().backward()
    assert float(layer.scorer.query_map.grad.abs().sum()) > 0


def test_bad_settings_are_refused() -> None:
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="peak_share"):
            make(peak_share=value)
    for other in ({"scorer": "bilinear"}, {"budget": "fixed"}):
        with pytest.raises(ValueError, match="peak_share needs scorer='low_rank' and budget="):
            make(**other)
