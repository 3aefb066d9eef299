"""The real model that ``experiments/fetch_smollm2.py`` puts into the cache, if it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.model_folder import (
    load_model,
    load_tokenizer,
    tokenize,
)
from dilated_attention_pytorch.hf.retrieval import build_task, measure_task
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig

CACHE = Path(__file__).resolve().parents[2] / ".cache"
MODEL, TEXTS = CACHE / "smollm2", CACHE / "texts"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").is_file(),
        reason="needs the model that experiments/fetch_smollm2.py fetches",
    ),
]


def test_sparsity_zero_and_the_oracle_read_the_needle_and_a_window_does_not() -> None:
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    # A text that does not change: whether half the blocks suffice depends on it.
    text = tokenize(tokenizer, (TEXTS / "debian-handbook.txt").read_text()[:20_000])
    ids = text[None, :256].long()
    with torch.no_grad():
        dense = model(ids).logits
        with adapt(model, AdaptiveConfig(base_sparsity=0.0, block_size=32, budget="fixed")):
            torch.testing.assert_close(model(ids).logits, dense, atol=2e-3, rtol=2e-3)
    samples = [build_task("needle", tokenizer, text, 512, seed) for seed in (0, 1)]
    assert measure_task(model, tokenizer, samples).score == 1
    found = {}
    for method in ("oracle", "sink_window"):
        with adapt(model, TrainingFreeConfig(method=method, base_sparsity=0.5, block_size=32)):
            found[method] = measure_task(model, tokenizer, samples).score
    assert found == {"oracle": 1, "sink_window": 0}
