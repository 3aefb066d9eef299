"""An adapter under another budget than it was distilled for."""

import pytest

pytest.importorskip("transformers", reason="the transformers package is not installed")

import torch

from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.observe import CountTiles
from dilated_attention_pytorch.hf.train_selectors import (
    distilled_config,
)
from tiny_models import tiny_model


def test_the_same_scores_give_every_row_the_same_share():
    model = tiny_model("llama")
    tokens = torch.randint(0, model.config.vocab_size, (256,))
    with adapt(model, distilled_config(block_size=16, base_sparsity=0.5)) as adapted:
        calibrate(adapted, tokens, 0.5, lengths=(128, 256), windows=1)
        adapter = SelectorAdapter.of(adapted)
    with adapter.with_budget("fixed").apply(model) as adapted:
        assert {config.budget for config in adapted.configs.values()} == {"fixed"}
        with CountTiles(adapted) as tiles:
            model(tokens[None])
    assert tiles.sparsity == pytest.approx(0.5, abs=0.02)
    assert {config.budget for config in adapter.configs.values()} == {"threshold"}


def test_a_floor_evens_the_rows_out_at_the_same_sparsity():
    model = tiny_model("llama")
    tokens = torch.randint(0, model.config.vocab_size, (1024,))
    with adapt(model, distilled_config(block_size=16, base_sparsity=0.6)) as adapted:
        adapter = SelectorAdapter.of(adapted)
    fewest = {}
    for floor in (0.0, 0.9):
        with adapter.with_budget("threshold", floor).apply(model) as adapted:
            calibrate(adapted, tokens, 0.6, lengths=(256,), windows=4)
            counts = []
            for selector in adapted.selectors.values():
                selector.observers.append(
                    lambda _, pattern, kept=counts: kept.append(pattern.kv_num_blocks[..., -4:])
                )
            with CountTiles(adapted) as tiles, torch.no_grad():
                for window in tokens.split(256):
                    model(window[None])
        assert tiles.sparsity == pytest.approx(0.6, abs=0.01)
        fewest[floor] = int(torch.cat(counts).min())
    assert fewest[0.0] < fewest[0.9]
