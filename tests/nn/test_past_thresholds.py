"""Thresholds weigh what a row sees, its own block too: with the past alone, by its first token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.selection.threshold import ThresholdTable

SIZE, TOKENS = 8, 61
SCORERS: dict[str, dict[str, Any]] = {
    "bilinear": {},
    "mlp": {"scorer": "mlp", "num_layers": 2, "pooling": ("attention", "max")},
    "low rank": {"scorer": "low_rank", "hidden_dim": 4, "query_stride": 2},
    "peaks": {"scorer": "low_rank", "hidden_dim": 4, "query_stride": 2, "peak_share": 0.7},
}


def make(name: str, heads: int = 4, **changes: Any) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    config = AdaptiveConfig(
        block_size=SIZE, budget="threshold", query_scope="past", **SCORERS[name], **changes
    )
    layer = BlockSparseAdaptive(None, None, heads, 8, config, num_kv_heads=2)
    with torch.no_grad():
        for _, weight in sorted(layer.named_parameters()):
            weight.normal_()
    layer.set_thresholds(ThresholdTable((20, 60), (0.2, 0.08)))
    return layer.double().eval()


def tokens(heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, TOKENS, h, 8, generator=generator, dtype=torch.float64)
        for h in (heads, 2, 2)
    ]


@pytest.mark.parametrize("name", SCORERS)
@torch.no_grad()
def test_nothing_later_changes_a_row(name: str) -> None:
    layer, inputs = make(name), tokens()
    documents = torch.tensor([[0, 19, TOKENS]] * 2)
    for call in ({}, {"key_lengths": torch.tensor([TOKENS, 50])}, {"cu_seqlens": documents}):
        want = layer(*inputs, is_causal=True, **call)
        for start in (1, 18, 27, 44):
            for junk in (torch.nan, torch.inf, 1e300, 3.0):
                changed = [x.clone() for x in inputs]
                for x in changed:
                    x[:, start:] = junk
                got = layer(*changed, is_causal=True, **call)
                assert torch.equal(got[:, :start], want[:, :start]), (call, start, junk)


@pytest.mark.parametrize("name", SCORERS)
@torch.no_grad()
def test_queries_that_begin_within_a_block_see_nothing_later(name: str) -> None:
    layer, (query, key, value) = make(name), tokens()
    query = query[:, 21:]
    want = layer(query, key, value, is_causal=True)
    for start in (3, 10, 25):
        changed = [x.clone() for x in (query, key, value)]
        changed[0][:, start:] = torch.nan
        for x in changed[1:]:
            x[:, 21 + start :] = torch.nan
        got = layer(*changed, is_causal=True)
        assert torch.equal(got[:, :start], want[:, :start]), start


@pytest.mark.parametrize("name", SCORERS)
@torch.no_grad()
def test_decoding_goes_on_as_a_pass_over_everything(name: str) -> None:
    layer, inputs = make(name), tokens()
    want = layer(*inputs, is_causal=True)
    state = SelectorState()
    layer.prefill(*(x[:, :21] for x in inputs), state)
    for n in range(21, TOKENS):
        key, value = (x[:, : n + 1] for x in inputs[1:])
        got = layer.decode(inputs[0][:, n : n + 1], key, value, state)
        torch.testing.assert_close(got, want[:, n : n + 1])


@torch.no_grad()
def test_layers_of_other_heads_have_the_same_thresholds() -> None:
    """What layers share of a length is not made for the heads of the first of them."""
    for heads, share in ((2, False), (4, False), (4, True)):
        layer = make("bilinear", heads, share_across_heads=share)
        assert layer(*tokens(heads), is_causal=True).isfinite().all()
