"""Settings that leave a selector nothing to choose are told, refused and found."""

from __future__ import annotations

import warnings

import pytest
import torch

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    MultiheadAdaptiveAttention,
    NothingToChooseWarning,
)
from dilated_attention_pytorch.selection.budget import (
    fitting_block_size,
    fitting_sparsity,
    most_sparse,
    nothing_to_choose,
)


def told(layer: torch.nn.Module, *inputs: torch.Tensor, **options: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(*inputs, **options)
    return [str(w.message) for w in caught if w.category is NothingToChooseWarning]


def make(**settings: object) -> BlockSparseAdaptive:
    return BlockSparseAdaptive(num_heads=2, head_dim=16, adaptive_config=AdaptiveConfig(**settings))


def test_the_defaults_at_a_thousand_tokens_are_told_once_with_the_nearest_that_work() -> None:
    """A row read 1.00 blocks, its own; nothing was said."""
    layer = MultiheadAdaptiveAttention(32, 2)
    x = torch.randn(1, 1024, 32)
    (words,) = told(layer, x, x, x, is_causal=True)
    assert "in 1,024 tokens a row sees 8.5 blocks of 64" in words
    assert "may read 0.85 of them, but 1.00 are always read" in words
    assert "block_size=16 or base_sparsity=0.75" in words
    assert told(layer, x, x, x, is_causal=True) == []


@pytest.mark.parametrize(
    ("settings", "causal"),
    [
        # What the words above say.
        ({"block_size": 16}, True),
        ({"base_sparsity": 0.75}, True),
        # The guide's own lengths, read both ways.
        ({}, False),
        ({"base_sparsity": 0.0}, True),
        ({"budget": "fixed", "num_selected_blocks": 1}, True),
    ],
)
def test_where_something_is_left_nothing_is_said(settings: dict, causal: bool) -> None:
    x = torch.randn(1, 1024, 2, 16)
    assert told(make(**settings), x, x, x, is_causal=causal) == []


def test_evaluation_of_short_inputs_is_nobodys_fault() -> None:
    x = torch.randn(1, 128, 2, 16)
    assert told(make().eval(), x, x, x, is_causal=True) == []
    assert len(told(make(), x, x, x, is_causal=True)) == 1


@pytest.mark.parametrize("length", [128, 256, 512, 1000, 2048, 4096, 8192])
@pytest.mark.parametrize("forced", [(0, 0), (1, 0), (1, 1)])
def test_what_fits_chooses_half_of_what_is_read(length: int, forced: tuple[int, int]) -> None:
    size = fitting_block_size(length)
    sparsity = fitting_sparsity(length, size, *forced)
    always = 1 - most_sparse(length, size, *forced)
    if sparsity:
        assert 1 - sparsity >= 2 * always - 1e-9
        config = AdaptiveConfig(
            block_size=size, num_sink_blocks=forced[0], num_local_blocks=forced[1]
        )
        assert nothing_to_choose(config, sparsity, length) is None


def test_shares_of_forced_blocks_equal_those_of_a_layer() -> None:
    for causal, sinks, local in ((True, 1, 1), (True, 0, 2), (False, 0, 0), (False, 2, 0)):
        layer = make(
            block_size=16, base_sparsity=0.99, budget="fixed", num_sink_blocks=sinks,
            num_local_blocks=local,
        ).eval()  # fmt: skip
        x = torch.randn(1, 160, 2, 16)
        _, info = layer(x, x, x, is_causal=causal, return_pattern=True)
        want = most_sparse(160, 16, sinks, local, causal=causal)
        found = float(info["pattern"].sparsity)
        # Without a past, sinks and the own block may be the same.
        assert found == pytest.approx(want, abs=0 if causal or not sinks else 0.05)
