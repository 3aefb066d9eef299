"""The dense backend: taken only where the pattern certainly leaves nothing out."""

import pytest
import torch

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockPattern,
    BlockSparseAdaptive,
    BlockSparseFixed,
    block_sparse_attention,
    explain_backend,
)
from dilated_attention_pytorch.nn.block_sparse import observe_patterns

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def inputs(q_len=50, kv_len=50, device="cpu", kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, q_len, 4, 16), (2, kv_len, kv_heads, 16), (2, kv_len, kv_heads, 16)]
    tensors = [torch.randn(*s, generator=generator).to(device, dtype) for s in shapes]
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "options"),
    [
        (50, 50, {}),
        (20, 50, {}),
        (50, 20, {"scale": 0.3}),
        (1, 50, {"causal": True}),
        (20, 50, {"causal": True, "query_offset": 49}),
    ],
)
def test_auto_takes_it_and_equals_the_reference(q_len, kv_len, options, device):
    tensors = inputs(q_len, kv_len, device)
    pattern = BlockPattern.dense(q_len, kv_len, block_size=16, device=device)
    assert explain_backend(*tensors, pattern, **options) == "dense: the pattern keeps every tile"
    weight = torch.linspace(-1, 1, 16, device=device)
    results = []
    for backend in ("auto", "dense", "reference"):
        out = block_sparse_attention(*tensors, pattern, backend=backend, **options)
        results.append([out, *torch.autograd.grad((out * weight).sum(), tensors)])
    for x, y, z in zip(*results, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_bias": True}, "block_bias"),
        ({"mass_probe": True}, "tile mass"),
        ({"return_lse": True}, "lse"),
        ({"key_lengths": torch.tensor([50, 20])}, "key_lengths"),
        ({"causal": True}, "hides tokens"),
        ({"causal": True, "query_offset": 3}, "hides tokens"),
    ],
)
def test_what_it_cannot_do_is_refused_and_left_to_others(options, reason):
    tensors = inputs()
    pattern = BlockPattern.dense(50, 50, block_size=16)
    options = {
        k: torch.zeros(pattern.kv_indices.shape) if k in ("block_bias", "mass_probe") else v
        for k, v in options.items()
    }
    assert explain_backend(*tensors, pattern, **options).startswith("gather")
    with pytest.raises(ValueError, match=f"backend='dense' cannot run this: .*{reason}"):
        block_sparse_attention(*tensors, pattern, backend="dense", **options)
    block_sparse_attention(*tensors, pattern, **options)


def test_a_pattern_that_only_looks_complete_is_not_trusted():
    tensors = inputs()
    pattern = BlockPattern.from_dense(
        torch.ones(4, 4, dtype=torch.bool), q_len=50, kv_len=50, block_size=16
    )
    assert explain_backend(*tensors, pattern).startswith("gather")
    with pytest.raises(ValueError, match="not known to keep every tile"):
        block_sparse_attention(*tensors, pattern, backend="dense")


def chosen_backends(layer, *tensors, **options):
    """Which backend ``auto`` takes for the pattern that a layer chose."""
    found = []
    with observe_patterns([layer], lambda _, pattern: found.append(pattern)):
        out = layer(*tensors, **options)
    causal = options.get("is_causal", False)
    return out, found[0], explain_backend(*tensors, found[0], causal=causal)


def test_layers_that_keep_everything_run_dense_and_others_do_not():
    causal = False
    tensors = inputs(kv_heads=4)
    settings = {"block_size": 16, "budget": "fixed"}
    makers = {
        "fixed": lambda s: BlockSparseFixed("local", 4, 16, base_sparsity=s, block_size=16),
        "adaptive": lambda s: BlockSparseAdaptive(
            None, None, 4, 16, AdaptiveConfig(base_sparsity=s, **settings)
        ),
    }
    for make in makers.values():
        out, pattern, reason = chosen_backends(make(0.0).eval(), *tensors, is_causal=causal)
        assert reason.startswith("dense")
        assert float(pattern.sparsity) == 0
        wanted = block_sparse_attention(*tensors, pattern, causal=causal, backend="reference")
        torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)
        _, _, reason = chosen_backends(make(0.5).eval(), *tensors, is_causal=causal)
        assert reason.startswith("gather")
    layer = makers["adaptive"](0.5).eval()
    layer.set_base_sparsity(0.0)
    assert chosen_backends(layer, *tensors, is_causal=causal)[2].startswith("dense")


def test_a_causal_pattern_is_complete_for_its_own_mask_only():
    tensors = inputs(kv_heads=4)
    layer = BlockSparseFixed("local", 4, 16, base_sparsity=0.0, block_size=16)
    _, pattern, _ = chosen_backends(layer, *tensors, is_causal=True)
    assert explain_backend(*tensors, pattern, causal=False).startswith("gather")
    limited = BlockSparseFixed(
        "local", 4, 16, base_sparsity=0.0, block_size=16,
        segment_lengths=[32], dilation_rates=[1],
    )  # fmt: skip
    assert chosen_backends(limited, *tensors)[2].startswith("gather")
    padded = chosen_backends(layer, *tensors, key_lengths=torch.tensor([50, 20]))[1]
    assert padded.complete_for is None
