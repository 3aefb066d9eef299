"""Fused selection by the low-rank scorer and training-free rules, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockPattern, BlockSparseAdaptive
from dilated_attention_pytorch.nn import scorings
from dilated_attention_pytorch.nn.baselines import BlockSparseTrainingFree, TrainingFreeConfig
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer, observe_patterns
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.selection.threshold import ThresholdTable, calibrate_threshold

pytest.importorskip("triton", reason="the triton package is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 16, 120


def adaptive(**settings: Any) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    common = {
        "scorer": "low_rank", "hidden_dim": 8, "budget": "threshold", "block_size": 16,
        "num_sink_blocks": 1, "base_sparsity": 0.5,
    }  # fmt: skip
    config = AdaptiveConfig(**{**common, **settings})
    layer = BlockSparseAdaptive(
        num_heads=HEADS, head_dim=DIM, num_kv_heads=KV_HEADS, adaptive_config=config,
        backend="triton",
    )  # fmt: skip
    if config.budget == "threshold":
        layer.set_thresholds(ThresholdTable((TOKENS,), (0.13,)))
    return layer.to(DEVICE).eval()


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = 2 * torch.randn(2, TOKENS, HEADS, DIM, generator=generator)
    key = torch.randn(2, TOKENS, KV_HEADS, DIM, generator=generator)
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype)


class SeenError(Exception):
    """Ends a forward pass whose inputs of the choice are known."""


def inputs_of(layer: BlockSparseLayer, query: Tensor, key: Tensor, **call: Any) -> SelectionInputs:
    """What the layer chooses by in a causal forward pass."""
    seen: list[SelectionInputs] = []

    def look(inputs: SelectionInputs) -> None:
        seen.append(inputs)
        raise SeenError

    layer.select = look  # type: ignore
    with torch.no_grad(), pytest.raises(SeenError):
        layer(query, key, key, is_causal=True, **call)
    del layer.select
    return seen[0]


def choice(layer: BlockSparseLayer, inputs: SelectionInputs, backend: str) -> Tensor:
    layer.backend = backend
    with torch.no_grad():
        chosen: BlockPattern = layer.select(inputs).pattern
    layer.backend = "triton"
    return chosen.to_dense()


def choices(
    layer: BlockSparseLayer, query: Tensor, key: Tensor, **call: Any
) -> tuple[Tensor, Tensor]:
    """What the fused path and the PyTorch path choose for a causal forward pass."""
    inputs = inputs_of(layer, query, key, **call)
    return choice(layer, inputs, "triton"), choice(layer, inputs, "gather")


def refusal(layer: BlockSparseAdaptive) -> str | None:
    return layer.unsupported_reason(inputs_of(layer, *tokens()))


@pytest.mark.parametrize("peak_share", [0.0, 0.5])
@pytest.mark.parametrize("scope", ["block", "past"])
@torch.no_grad()
def test_decoding_rates_a_row_with_the_kernel_as_in_pytorch(
    scope: str, peak_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache with room, samples of two lengths with padding on the left."""
    layer, outs, kernels = adaptive(query_scope=scope, peak_share=peak_share), [], []
    if peak_share:
        # By peaks alone.
        layer.set_thresholds(ThresholdTable((TOKENS,), (9.0,)))
    query, key = tokens()
    starts = torch.tensor([0, 7], device=DEVICE)

    def count(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        kernels.append(1)
        return run(*args, **options)

    # The newest query of a row whose other queries have been rated has a kernel of its own.
    for name in ("low_rank_scores", "list_newest"):
        run = partial(count, getattr(scorings, name))
        monkeypatch.setattr(scorings, name, run)
    compact = [torch.stack([x[0, :60], x[1, 7:67]]) for x in (query, key)]
    for backend in ("triton", "gather"):
        layer.backend, state = backend, SelectorState()
        layer.prefill(*compact, compact[1], state, key_lengths=60 - starts, starts=starts)
        steps = [layer.decode(query[:, n : n + 1], key, key, state) for n in range(60, 65)]
        outs.append(torch.cat(steps, 1))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    # The prompt and five tokens.
    assert len(kernels) == 6


@pytest.mark.parametrize("scope", ["block", "past"])
def test_a_calibration_meets_the_sparsity(scope: str) -> None:
    """With thresholds of every row's own length too."""
    layer = adaptive(query_scope=scope)
    layer.backend = "gather"
    inputs = inputs_of(layer, *tokens())
    with torch.no_grad():
        found = calibrate_threshold([layer.threshold_sample(inputs)], 0.5)
        layer.set_thresholds(ThresholdTable((TOKENS,), (found,)))
        pattern = layer.select(inputs).pattern
    assert abs(float(pattern.sparsity.mean()) - 0.5) < 0.02


CALLS = {
    "plain": {},
    "lengths": {"key_lengths": (100, 35)},
    "documents": {"cu_seqlens": ((0, 50, 90, 120), (0, 10, 110, 110))},
    "offset": {"query_offset": 80},
}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *(({}, name) for name in CALLS),
        *(({"query_scope": "past"}, name) for name in CALLS),
        # What a query sees and the other settings do not know of each other.
        *(({"share_within_kv_group": True}, name) for name in ("plain", "documents")),
        *(({"num_local_blocks": 2}, name) for name in ("plain", "lengths")),
        *(({"query_scope": "past", "query_stride": 1}, name) for name in ("plain", "offset")),
        *(({"peak_share": 0.5, "threshold_floor": 0.8}, name) for name in CALLS),
        *(({"peak_share": 1.0, "query_scope": "past"}, name) for name in CALLS),
        ({"peak_share": 0.3, "share_within_kv_group": True}, "plain"),
    ],
    ids=str,
)
def test_low_rank_chooses_as_in_pytorch(name: str, settings: dict[str, Any]) -> None:
    layer = adaptive(**settings)
    query, key = tokens()
    call = {
        k: torch.tensor(v, device=DEVICE) if isinstance(v, tuple) else v
        for k, v in CALLS[name].items()
    }
    if name == "offset":
        query = query[:, :40]
    inputs = inputs_of(layer, query, key, **call)
    kept = []
    # All that a row sees; some; only what it must read.
    for threshold in (1e-12, 0.13, 2.0) if name == "plain" else (1e-12, 0.13):
        layer.set_thresholds(ThresholdTable((TOKENS,), (threshold,)))
        fused, plain = (choice(layer, inputs, backend) for backend in ("triton", "gather"))
        assert torch.equal(fused, plain)
        kept.append(int(plain.sum()))
    assert kept == sorted(set(kept), reverse=True)


@pytest.mark.parametrize("name", CALLS)
def test_a_floor_below_the_thresholds(name: str) -> None:
    """Against the larger of both budgets, row by row, on the fused and on the PyTorch path."""
    query, key = tokens()
    call = {
        k: torch.tensor(v, device=DEVICE) if isinstance(v, tuple) else v
        for k, v in CALLS[name].items()
    }
    if name == "offset":
        query = query[:, :40]
    kept = {}
    for floor in (0.0, 0.5, 0.999):
        layer = adaptive(threshold_floor=floor)
        layer.set_thresholds(ThresholdTable((TOKENS,), (0.3,)))
        inputs = inputs_of(layer, query, key, **call)
        kept[floor] = choice(layer, inputs, "gather")
        if floor == 0.5:
            assert torch.equal(choice(layer, inputs, "triton"), kept[floor])
    even = choice(adaptive(budget="fixed"), inputs, "gather").sum(-1)
    # A floor adds to what the threshold keeps, up to the even budget (0.999 of it is rounded).
    assert not bool((kept[0.0] & ~(kept[0.5] & kept[0.999])).any())
    wanted = torch.maximum(kept[0.0].sum(-1), even)
    assert bool(((wanted - kept[0.999].sum(-1)).abs() <= 1).all())
    # Short sequences have rows that hold forced blocks alone.
    if name == "plain":
        assert kept[0.0].sum() < kept[0.5].sum() < kept[0.999].sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": "fixed"},
        {"budget": "adaptive"},
        {"budget": "adaptive", "pooling": ("max",)},
        {"budget": "fixed", "num_selected_blocks": 2},
        {"budget": "adaptive", "query_scope": "past"},
    ],
)
def test_other_budgets_choose_as_in_pytorch(settings: dict[str, Any]) -> None:
    fused, plain = choices(adaptive(**settings), *tokens())
    assert torch.equal(fused, plain)


@pytest.mark.parametrize("name", ["lengths", "documents"])
def test_scores_win_blocks_as_in_pytorch(name: str) -> None:
    layer = adaptive(budget="adaptive", num_sink_blocks=1)
    layer.budget_state[0, :3] = torch.tensor([1.0, 0.3, 0.15], device=DEVICE)
    call = {key: torch.tensor(value, device=DEVICE) for key, value in CALLS[name].items()}
    fused, plain = choices(layer, *tokens(), **call)
    assert torch.equal(fused, plain)
    layer.budget_state[0, 2] = 2.0
    assert int(plain.sum()) > int(choices(layer, *tokens(), **call)[1].sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_few_blocks(dtype: torch.dtype) -> None:
    fused, plain = choices(adaptive(), *tokens(dtype))
    assert (fused != plain).sum() <= 2


@pytest.mark.parametrize("floor", [0.0, 0.8])
@pytest.mark.parametrize("method", ["mean_pool", "antidiagonal", "min_max", "oracle"])
def test_rivals_choose_as_in_pytorch(method: str, floor: float) -> None:
    config = TrainingFreeConfig(
        method=method, budget="threshold", threshold_floor=floor, base_sparsity=0.6, block_size=16
    )
    layer = BlockSparseTrainingFree(config, HEADS, DIM, num_kv_heads=KV_HEADS, backend="triton")
    layer.set_thresholds(ThresholdTable((TOKENS,), (0.13,)))
    fused, plain = choices(layer, *tokens())
    assert torch.equal(fused, plain)
    assert 0 < plain.sum() < plain.numel() / 2
    if floor:
        # Every row that may choose keeps a block by score beside the forced ones.
        assert int(plain[..., -1, :].sum(-1).min()) >= 3


def test_the_density_is_recorded() -> None:
    layer = adaptive()
    query, key = tokens()
    losses = []
    for backend in ("triton", "gather"):
        layer.backend = backend
        layer(query, key, key, is_causal=True)
        losses.append(layer.get_sparsity_loss())
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("peak_share", [0.0, 0.7])
def test_calibration_reads_the_same_scores(peak_share: float) -> None:
    layer = adaptive(peak_share=peak_share)
    query, key = tokens()
    inputs = inputs_of(layer, query, key)
    fused = layer.threshold_sample(inputs)
    layer.backend = "gather"
    plain = layer.threshold_sample(inputs)
    assert (fused.forced, fused.allowed) == (plain.forced, plain.allowed)
    torch.testing.assert_close(fused.expected, plain.expected, rtol=1e-5, atol=1e-6)


def test_what_takes_the_pytorch_path_says_why() -> None:
    assert refusal(adaptive()) is None
    assert "learns" in str(refusal(adaptive().train()))
    segments = BlockSparseAdaptive(
        [64], [1], HEADS, DIM, adaptive().config, num_kv_heads=KV_HEADS, backend="triton"
    )
    segments.set_thresholds(ThresholdTable((TOKENS,), (0.13,)))
    assert "segments" in str(refusal(segments.to(DEVICE).eval()))
    assert "threshold" in str(refusal(adaptive(scorer="bilinear")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("length", [2048, 4096, 8192])
def test_on_a_gpu_the_choice_is_that_of_float32_and_nothing_waits(length: int) -> None:
    torch.manual_seed(0)
    config = AdaptiveConfig(scorer="low_rank", budget="threshold", block_size=64, num_sink_blocks=1)
    layer = BlockSparseAdaptive(
        num_heads=9, head_dim=64, num_kv_heads=3, adaptive_config=config, backend="auto"
    )
    layer.set_thresholds(ThresholdTable((2048,), (0.03,)))
    layer = layer.cuda().eval()
    shared = torch.randn(1, length // 64, 12, 64, device="cuda").repeat_interleave(64, 1)
    both = (torch.randn(1, length, 12, 64, device="cuda") + 1.5 * shared).bfloat16()
    query, key = both[:, :, :9], both[:, :, 9:]
    fused, plain = choices_on_gpu(layer, query, key)
    both_chose = float((fused & plain).sum())
    assert both_chose / float(plain.sum()) > 0.99
    assert both_chose / float(fused.sum()) > 0.99
    assert 0.5 < 1 - float(plain.sum()) / (9 * (length // 64) * (length // 64 + 1) / 2) < 0.99
    with torch.no_grad():
        layer(query, key, key, is_causal=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(query, key, key, is_causal=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def choices_on_gpu(layer: BlockSparseAdaptive, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for backend in ("auto", "gather"):
        layer.backend = backend
        patterns: list[BlockPattern] = []
        watch = observe_patterns([layer], lambda _, p, kept=patterns: kept.append(p))
        with watch, torch.no_grad():
            layer(query, key, key, is_causal=True)
        found.append(patterns[0].to_dense())
    layer.backend = "auto"
    return found[0], found[1]
