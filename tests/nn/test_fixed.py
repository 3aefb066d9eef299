"""BlockSparseFixed: every constructor argument, and equality with the adaptive budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    BlockSparseFixed,
    fixed_pattern,
)


def tokens(length: int = 320, heads: int = 4) -> Tensor:
    return torch.randn(2, length, heads, 8, generator=torch.Generator().manual_seed(0))


def kept(layer: torch.nn.Module, causal: bool = True) -> Tensor:
    x, kv = tokens(), tokens(heads=layer.num_kv_heads)
    _, info = layer(x, kv, kv, is_causal=causal, return_pattern=True)
    return info["pattern"].to_dense()


def make(name: str = "local", **options: object) -> BlockSparseFixed:
    return BlockSparseFixed(name, 4, 8, **{"block_size": 16, "base_sparsity": 0.7, **options})


@pytest.mark.parametrize("name", ["local", "dilated", "strided", "hierarchical", "sink_local",
                                  "random", "dense"])  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_layer_uses_the_named_pattern(name: str, causal: bool) -> None:
    sparsity = 0.0 if name == "dense" else 0.7
    expected = fixed_pattern(
        name, 320, num_heads=4, base_sparsity=sparsity, block_size=16, causal=causal
    )
    got = kept(make(name, base_sparsity=sparsity), causal)
    assert torch.equal(got, expected.to_dense())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"num_local_blocks": 1}, {"num_sink_blocks": 2},
    {"segment_lengths": [64, 320], "dilation_rates": [1, 4]},
])  # fmt: skip
def test_budget_is_that_of_the_adaptive_layer(causal: bool, options: dict) -> None:
    groups = {k: options[k] for k in ("segment_lengths", "dilation_rates") if k in options}
    forced = {k: v for k, v in options.items() if k not in groups}
    config = AdaptiveConfig(block_size=16, base_sparsity=0.7, budget="fixed", **forced)
    adaptive = BlockSparseAdaptive(num_heads=4, head_dim=8, adaptive_config=config, **groups)
    count = kept(adaptive.eval(), causal).sum(-1)
    for name in ("local", "strided", "random"):
        assert torch.equal(kept(make(name, **options), causal).sum(-1)[0], count[0])


def test_base_sparsity() -> None:
    for sparsity in (0.0, 0.5, 0.8):
        dense = kept(make(base_sparsity=sparsity), causal=False)
        assert dense.float().mean().item() == pytest.approx(1 - sparsity, abs=0.003)


def test_num_selected_blocks() -> None:
    assert (kept(make(num_selected_blocks=3), causal=False).sum(-1) == 4).all()


def test_segments_limit_the_pattern() -> None:
    dense = kept(make(segment_lengths=[64], dilation_rates=[1], base_sparsity=0.0), causal=False)
    block = torch.arange(20) // 4
    assert torch.equal(dense[0, 0], block[:, None] == block)


def test_kv_heads_and_sizes() -> None:
    layer = make(num_kv_heads=2)
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (4, 2, 8)
    assert kept(layer).shape == (1, 4, 20, 20)
    assert kept(make(block_size=32)).shape == (1, 4, 10, 10)


def test_forced_blocks() -> None:
    dense = kept(make(num_selected_blocks=0, num_local_blocks=1, num_sink_blocks=1), causal=False)
    i, j = torch.arange(20)[:, None], torch.arange(20)
    assert torch.equal(dense[0, 0], ((i - j).abs() <= 1) | (j == 0))


def test_content_changes_nothing() -> None:
    layer = make("random")
    x = tokens()
    _, one = layer(x, x, x, return_pattern=True)
    _, two = layer(-3 * x, 5 * x, x, return_pattern=True)
    assert torch.equal(one["pattern"].to_dense(), two["pattern"].to_dense())
    assert list(layer.parameters()) == []


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("pattern.*strided", {"name": "nonsense"}),
        ("base_sparsity", {"base_sparsity": 1.0}),
        ("base_sparsity", {"name": "dense", "base_sparsity": 0.5}),
        ("num_selected_blocks", {"name": "dense", "base_sparsity": 0.0, "num_selected_blocks": 1}),
        ("num_selected_blocks", {"num_selected_blocks": -1}),
        ("block_size", {"block_size": 0}),
        ("num_local_blocks", {"num_local_blocks": -1}),
        ("num_sink_blocks", {"num_sink_blocks": -1}),
    ],
)
def test_bad_arguments(match: str, options: dict) -> None:
    with pytest.raises(ValueError, match=match):
        make(**options)
