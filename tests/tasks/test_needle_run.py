"""Settings of a needle run reach the model."""

import pytest
import torch

from dilated_attention_pytorch.tasks.needle import (
    NeedleRun,
    build_needle_model,
    needle_config,
    train_needle,
)


@pytest.mark.parametrize("attention", ["adaptive", "local"])
def test_the_backend_reaches_every_layer_with_a_pattern(attention):
    run = NeedleRun(attention, needle_config(), num_layers=2, steps=1, backend="bogus")
    with pytest.raises(ValueError, match="'bogus'"):
        next(train_needle(run, build_needle_model(run)))


def test_the_dtype_is_checked_and_switches_autocast():
    with pytest.raises(ValueError, match="dtype must be"):
        NeedleRun("dense", needle_config(), dtype="float16")
    for dtype, expected in (("float32", False), ("bfloat16", True)):
        with NeedleRun("dense", needle_config(), dtype=dtype).autocast():
            assert torch.is_autocast_enabled("cpu") is expected


def test_kv_heads_reach_projections_and_layers():
    run = NeedleRun("adaptive", needle_config(), num_heads=4, num_kv_heads=2)
    (block,) = build_needle_model(run).transformer.blocks
    assert block.qkv.weight.shape[0] == (4 + 2 + 2) * 16
    assert block.attention.num_kv_heads == 2
