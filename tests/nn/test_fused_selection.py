"""The fused selection against the layer's PyTorch path: the same blocks, the same gradients."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.mask import AttentionMask

pytest.importorskip("triton", reason="the triton package is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS, EDGES = [70, 37], [[0, 30, 41, 70], [0, 50, 60, 64]]
LATTICE = ([32, 64], [1, 2])
PAST: dict[str, Any] = {"query_scope": "past"}

CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "default": ({}, (None, None), {}),
    "causal": ({}, (None, None), {"is_causal": True}),
    "padded": ({"pooling": ("mean", "max", "min", "attention")}, (None, None),
               {"is_causal": True, "key_lengths": LENGTHS}),
    "deep, all heads alike": ({"num_layers": 2, "share_across_heads": True}, (None, None), {}),
    "documents": ({"share_within_kv_group": True, "pooling": ("max",)}, (None, None),
                  {"cu_seqlens": EDGES, "is_causal": True}),
    "kv group, lattice": ({"hidden_dim": 8, "share_within_kv_group": True, "budget": "fixed"},
                          LATTICE, {"is_causal": True}),
    "lattice": ({"num_local_blocks": 1, "num_sink_blocks": 1}, LATTICE, {}),
    "count": ({"budget": "fixed", "num_selected_blocks": 2}, LATTICE,
              {"is_causal": True, "cu_seqlens": EDGES}),
    "past": (PAST, (None, None), {"is_causal": True}),
    "past, padded": ({**PAST, "pooling": ("max", "attention", "mean", "min")}, (None, None),
                     {"is_causal": True, "key_lengths": LENGTHS}),
    "past, documents": ({**PAST, "share_within_kv_group": True, "base_sparsity": 0.7},
                        (None, None), {"cu_seqlens": EDGES, "is_causal": True}),
    "past, all heads alike": ({**PAST, "share_across_heads": True, "base_sparsity": 0.8},
                              (None, None), {"is_causal": True}),
    "past, lattice": ({**PAST, "num_local_blocks": 1, "num_sink_blocks": 1}, LATTICE,
                      {"is_causal": True}),
    "past, fixed": ({**PAST, "hidden_dim": 8, "budget": "fixed"}, (None, None),
                    {"is_causal": True}),
    "past, fewer queries": ({**PAST, "base_sparsity": 0.7}, (None, None),
                            {"is_causal": True, "kv_len": 131}),
    "past, count": ({**PAST, "budget": "fixed", "num_selected_blocks": 1}, (None, None),
                    {"is_causal": True}),
    "past, hierarchy": ({**PAST, "hierarchy": (2,), "hierarchy_keep": 1}, (None, None),
                        {"is_causal": True}),
    "past, not causal": (PAST, (None, None), {}),
    "cross": ({}, (None, None), {"cross_attention": True}),
    "everything": ({"base_sparsity": 0.0}, (None, None), {"is_causal": True}),
    "past, everything": ({**PAST, "base_sparsity": 0.0}, LATTICE, {"is_causal": True}),
}  # fmt: skip


def make(settings: dict[str, Any], lattice: Any) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    values = {"block_size": 16, "base_sparsity": 0.5, "hard_sparsity": True, **settings}
    layer = BlockSparseAdaptive(*lattice, 4, 16, AdaptiveConfig(**values), num_kv_heads=2)
    return layer.to(DEVICE)


def inputs(kv_len: int = 70, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, 70, 4, 16), *[(batch, kv_len, 2, 16)] * 2]
    drawn = [torch.randn(s, generator=generator).to(DEVICE) for s in shapes]
    return [x.requires_grad_() for x in drawn]


def run(layer: BlockSparseAdaptive, backend: str, options: dict[str, Any]) -> list[Any]:
    """What was chosen, the sparsity loss and every gradient."""
    # Each pass in training moves the budgets of its layer.
    layer = deepcopy(layer)
    layer.backend = backend
    kv_len = 50 if options.get("cross_attention") else options.get("kv_len", 70)
    # Two samples where they differ: the interpreter takes its time.
    batch = 2 if "key_lengths" in options or "cu_seqlens" in options else 1
    tensors = inputs(kv_len, batch)
    given = {
        k: torch.tensor(v, device=DEVICE) if isinstance(v, list) else v
        for k, v in options.items()
        if k != "kv_len"
    }
    out, info = layer(*tensors, return_pattern=True, **given)
    loss = layer.get_sparsity_loss()
    total = (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum()
    (total + loss).backward()
    found = [info["pattern"].to_dense().expand(batch, -1, -1, -1), loss.detach()]
    if layer.config.base_sparsity:
        # Where nothing is left out, the kernels measure nothing.
        found.append(layer.budget_state[:, :3])
    return found + [x.grad for x in (*tensors, *layer.parameters())]


@pytest.mark.parametrize("case", CASES)
def test_fused_equals_the_pytorch_path(case: str) -> None:
    settings, lattice, options = CASES[case]
    layer = make(settings, lattice)
    want, got = run(layer, "gather", options), run(layer, "triton", options)
    assert torch.equal(want[0], got[0])
    for x, y in zip(want[1:], got[1:], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5)


def refusal(backend: str, **settings: Any) -> str:
    layer = make(settings, (None, None))
    layer.backend = backend
    x = torch.randn(1, 32, 4, 16, device=DEVICE)
    mask = AttentionMask(32, 32)
    return str(layer.unsupported_reason(layer._inputs(x, x[:, :, :2], mask, None, True, None)))


def test_which_path_runs_and_why() -> None:
    assert refusal("triton") == "None"
    assert "estimator 'gumbel'" in refusal("triton", estimator="gumbel")
    assert refusal("triton", scorer="mlp") == "scorer 'mlp' has no kernel"
    assert "backend='gather'" in refusal("gather")
    assert refusal("auto") == ("None" if DEVICE.type == "cuda" else "the PyTorch path runs on cpu")


def test_training_keeps_random_blocks_within_the_rules() -> None:
    layer = make({"hard_sparsity": False, "num_explore_blocks": 2, "budget": "fixed",
                  "num_selected_blocks": 1}, (None, None))  # fmt: skip
    layer.backend = "triton"
    q, k, v = inputs(batch=1)
    generator = torch.Generator(DEVICE).manual_seed(3)
    drawn = []
    for _ in range(2):
        _, info = layer(q, k, v, is_causal=True, return_pattern=True, generator=generator)
        info["pattern"].validate()
        count = info["pattern"].kv_num_blocks
        # The diagonal, one scored and two random blocks, as far as there are any.
        most = torch.arange(1, 6, device=DEVICE).clamp(max=4).int()
        assert torch.equal(count, most.expand_as(count))
        drawn.append(info["pattern"].to_dense())
    assert not torch.equal(*drawn)


def test_a_pattern_from_another_layer_is_attended_to_as_it_is() -> None:
    first, second = make({}, (None, None)), make({"base_sparsity": 0.1}, (None, None))
    q, k, v = inputs()
    out, info = first(q, k, v, is_causal=True, return_pattern=True)
    again, same = second(q, k, v, is_causal=True, pattern=info["pattern"], return_pattern=True)
    assert same["pattern"] is info["pattern"]
    torch.testing.assert_close(out, again)
    again.sum().backward()
    assert all(p.grad is None for p in second.parameters())
    with pytest.raises(ValueError, match="pattern was made for"):
        second(q[:, :32], k[:, :32], v[:, :32], pattern=info["pattern"])


def test_autocast_does_not_round_the_scores() -> None:
    layer = make({}, (None, None)).eval()
    layer.backend = "triton"
    q, k, _ = (x.detach() for x in inputs())
    mask = AttentionMask(70, 70, True)
    given = layer._inputs(q, k, mask, None, True, None)
    plain = layer.select(given).pattern
    with torch.autocast(DEVICE.type, torch.bfloat16):
        rounded = layer.select(given).pattern
    assert torch.equal(plain.kv_indices, rounded.kv_indices)
