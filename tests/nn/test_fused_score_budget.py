"""Budgets that scores win: with kernels as in PyTorch, and not looked for where none can."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.nn import budgets, buffers
from dilated_attention_pytorch.nn.state import SelectorState

pytest.importorskip("triton", reason="the triton package is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = 130
LENGTHS, EDGES = [130, 75], [[0, 30, 48, 130], [0, 90, 100, 128]]
LATTICE = ([64, 160], [1, 2])
PAST: dict[str, Any] = {"query_scope": "past"}

CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "both ways": ({}, (None, None), {}),
    "causal, sinks, local": ({"num_sink_blocks": 1, "num_local_blocks": 1},
                             (None, None), {"is_causal": True}),
    "padded": ({}, (None, None), {"is_causal": True, "key_lengths": LENGTHS}),
    "documents": ({}, (None, None), {"is_causal": True, "cu_seqlens": EDGES}),
    "heads alike": ({"share_across_heads": True}, (None, None), {"is_causal": True}),
    "groups": ({"share_within_kv_group": True, "hidden_dim": 8}, (None, None),
               {"is_causal": True}),
    "segments": ({"num_sink_blocks": 1}, LATTICE, {"is_causal": True}),
    "hierarchy": ({"hierarchy": (2,), "hierarchy_keep": 3}, (None, None),
                  {"is_causal": True}),
    "past": (PAST, (None, None), {"is_causal": True, "key_lengths": LENGTHS}),
    "past, documents": ({**PAST}, (None, None),
                        {"is_causal": True, "cu_seqlens": EDGES}),
    "past, segments": ({**PAST}, LATTICE, {"is_causal": True}),
}  # fmt: skip


def make(settings: dict[str, Any], lattice: Any = (None, None)) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    values = {"block_size": 16, "base_sparsity": 0.6, "hard_sparsity": True, **settings}
    layer = BlockSparseAdaptive(*lattice, 4, 16, AdaptiveConfig(**values), num_kv_heads=2)
    with torch.no_grad():
        # Scores that differ enough to win anything.
        layer.scorer.gain.mul_(30)
    return layer.to(DEVICE)


def set_threshold(layer: BlockSparseAdaptive, threshold: float) -> None:
    """In force next, with a small even share."""
    layer.budget_state[0, :3] = torch.tensor([1.0, 0.1, threshold], device=DEVICE)
    layer.budget_state[1, 5:] = 1.0
    layer.budget_state[1, 6:7] = 0.1**2


def inputs(batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, TOKENS, 4, 16), *[(batch, TOKENS, 2, 16)] * 2]
    return [torch.randn(s, generator=generator).to(DEVICE) for s in shapes]


def step(layer: BlockSparseAdaptive, backend: str, options: dict[str, Any]) -> list[Tensor]:
    """One step of training by a copy: what was chosen, and what the layer measured of it."""
    layer = copy.deepcopy(layer).train()
    layer.backend = backend
    batch = 2 if "key_lengths" in options or "cu_seqlens" in options else 1
    given = {
        k: torch.tensor(v, device=DEVICE) if isinstance(v, list) else v for k, v in options.items()
    }
    tensors = [x.requires_grad_() for x in inputs(batch)]
    out, info = layer(*tensors, return_pattern=True, **given)
    out.square().sum().backward()
    return [info["pattern"].to_dense().expand(batch, -1, -1, -1), layer.budget_state[:, :3]]


@pytest.mark.parametrize("case", CASES)
def test_scores_win_the_same_blocks_with_kernels(case: str) -> None:
    settings, lattice, options = CASES[case]
    layer = make(settings, lattice)
    set_threshold(layer, 0.12)
    want, got = step(layer, "gather", options), step(layer, "triton", options)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-6)
    set_threshold(layer, 64.0)
    without = step(layer, "gather", options)[0]
    assert int(want[0].sum()) > int(without.sum())


class CountedError(Exception):
    """Scores are counted."""


@pytest.fixture
def no_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Tensor:
        raise CountedError

    monkeypatch.setattr(budgets, "blocks_above", refuse)
    monkeypatch.setattr(budgets, "count_above", refuse)


@pytest.mark.parametrize("backend", ["gather", "triton"])
@pytest.mark.usefixtures("no_counting")
def test_evaluation_counts_nothing_where_no_score_can_win(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, where values are read when they have changed.
    monkeypatch.setattr(buffers, "_counts_writes", lambda tensor: True)
    layer = make({}).eval()
    layer.backend = backend
    query, key, value = inputs(1)
    with torch.no_grad():
        layer(query, key, value, is_causal=True)
        set_threshold(layer, 0.12)
        with pytest.raises(CountedError):
            layer(query, key, value, is_causal=True)
        set_threshold(layer, 64.0)
        layer(query, key, value, is_causal=True)
    with pytest.raises(CountedError):
        # What training will do is not known on the host.
        layer.train()(query, key, value, is_causal=True)


@pytest.mark.parametrize("scope", ["block", "past"])
@pytest.mark.usefixtures("no_counting")
@torch.no_grad()
def test_generation_counts_nothing_where_no_score_can_win(scope: str) -> None:
    layer = make({"query_scope": scope}).eval()
    query, key, value = inputs(1)
    state = SelectorState()
    layer.prefill(query[:, :64], key[:, :64], value[:, :64], state)
    layer.decode(query[:, 64:65], key, value, state)
    state.reset()
    layer.prefill(query[:, :64], key[:, :64], value[:, :64], state)
    set_threshold(layer, 0.12)
    with pytest.raises(CountedError):
        layer.decode(query[:, 64:65], key, value, state)


@torch.no_grad()
def test_recorded_programs_count_for_later_thresholds() -> None:
    layer, given = make({}).eval(), tuple(inputs(1))
    program = torch.export.export(layer, given, {"is_causal": True}, strict=False).module()
    for threshold in (0.12, 64.0):
        set_threshold(layer, threshold)
        program.budget_state.copy_(layer.budget_state)
        want = layer(*given, is_causal=True)
        torch.testing.assert_close(program(*given, is_causal=True), want, rtol=1e-5, atol=1e-6)
