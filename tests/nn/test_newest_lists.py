"""The kernels that list a new token's blocks keep what PyTorch keeps, and remember as much."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.nn import decode
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.ops.block_sparse_attention.cpp import build_failure
from dilated_attention_pytorch.selection.threshold import ThresholdTable

SIZE, HEADS, KV_HEADS, DIM = 16, 4, 2, 24
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CASES = {
    "distill": {"num_sink_blocks": 1, "peak_share": 0.5, "threshold_floor": 0.8},
    "thresholds alone": {"query_stride": 4},
    "kv group": {"share_within_kv_group": True, "peak_share": 0.25, "num_local_blocks": 1},
    "shared": {"share_across_heads": True, "peak_share": 1.0, "hidden_dim": 5},
}


def make(backend: str, options: dict) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    settings = {"query_stride": 2, "hidden_dim": 16, "base_sparsity": 0.5} | options
    config = AdaptiveConfig(
        scorer="low_rank", budget="threshold", block_size=SIZE, query_scope="block", **settings
    )
    layer = BlockSparseAdaptive(None, None, HEADS, DIM, config, num_kv_heads=KV_HEADS)
    layer.set_thresholds(ThresholdTable((40, 200), (0.25, 0.08)))
    layer.backend = backend
    return layer.to(DEVICE).eval()


def tokens(length: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, length, HEADS + 2 * KV_HEADS, DIM)
    every = torch.randn(shape, generator=generator, dtype=torch.float32)
    return list(every.to(DEVICE).split([HEADS, KV_HEADS, KV_HEADS], 2))


def backends() -> list:
    if ON_GPU:
        return [pytest.param("triton", marks=pytest.mark.gpu)]
    return ["cpp", "triton"]


@pytest.fixture(params=backends())
def backend(request) -> str:
    """Triton's interpreter stands in where there is no GPU."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="the triton package is not installed")
    elif reason := build_failure():
        pytest.skip(reason)
    return request.param


@pytest.fixture
def listed(monkeypatch) -> list[bool]:
    """Whether a kernel made each list."""
    found, run = [], decode.list_newest_row

    def watched(*given) -> bool:
        found.append(run(*given))
        return found[-1]

    monkeypatch.setattr(decode, "list_newest_row", watched)
    return found


def remembered(state: SelectorState) -> list[Tensor]:
    memory = state.filled()
    width = int(memory.counts.max())
    return [memory.counts, memory.indices[..., :width], memory.sampled, memory.masses, memory.peaks]


@pytest.mark.parametrize("ragged", [False, True], ids=["alike", "ragged"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_lists_and_sums_are_those_of_pytorch(name, ragged, backend, listed) -> None:
    """Ragged: samples of their own lengths, behind padding, in a cache with room."""
    q, k, v = tokens(150)
    lengths, starts = torch.tensor([70, 53], device=DEVICE), torch.tensor([0, 17], device=DEVICE)
    kinds = {"key_lengths": lengths, "starts": starts} if ragged else {}
    layers = [make(x, CASES[name]) for x in ("gather", backend)]
    states = [SelectorState() for _ in layers]

    def moved(x: Tensor) -> Tensor:
        # Token 0 of the second sample lies at place 17 of the cache.
        return torch.stack([x[0], x[1].roll(17, 0)]) if ragged else x

    for layer, state in zip(layers, states, strict=True):
        layer.remember(q[:, :70], k[:, :70], state, **kinds)
    cache_k, cache_v = moved(k), moved(v)
    for step in range(20):
        new = torch.stack([q[0, 70 + step], q[1, (53 if ragged else 70) + step]])[:, None]
        until = 150 if ragged else 71 + step
        outs = [
            layer.decode(new, cache_k[:, :until], cache_v[:, :until], state)
            for layer, state in zip(layers, states, strict=True)
        ]
        for mine, want in zip(*map(remembered, reversed(states)), strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
    assert not any(listed[::2])
    # But for the first one, for which nothing is remembered yet.
    assert all(listed[3::2])


@torch.no_grad()
def test_weights_are_read_inside_of_the_call(backend, listed) -> None:
    """As wrappers load them there and free them behind it."""
    layer, other = make(backend, CASES["distill"]), make(backend, CASES["distill"])
    kept = {name: x.clone() for name, x in other.scorer.named_parameters()}

    def load(module, *_) -> None:
        for name, value in kept.items():
            setattr(module, name, nn.Parameter(value))

    def free(module, *_) -> None:
        for name, value in kept.items():
            setattr(module, name, nn.Parameter(torch.full_like(value, torch.nan)))

    other.scorer.register_forward_pre_hook(load)
    other.scorer.register_forward_hook(free)
    qkv, states = tokens(80), [SelectorState(), SelectorState()]
    for each, state in zip((layer, other), states, strict=True):
        each.prefill(*(x[:, :70] for x in qkv), state)
        for last in range(71, 77):
            query, key, value = (x[:, :last] for x in qkv)
            each.decode(query[:, -1:], key, value, state)
    assert any(listed)
    for mine, want in zip(*map(remembered, states), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.skipif(ON_GPU, reason="a GPU has other kernels")
@pytest.mark.skipif(build_failure() is not None, reason="there is no compiled kernel")
@pytest.mark.parametrize(("lengths", "most"), [((70,), 36), ((70, 53), 56)])
@torch.no_grad()
def test_a_new_token_takes_few_operations(lengths: tuple[int, ...], most: int) -> None:
    """207 without the kernel; each costs the host some microseconds, whatever it computes.

    Layers of a model share what follows from lengths; here there is one of them.
    """
    layer, counted, state = make("cpp", CASES["distill"]), [], SelectorState()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func)
            return func(*args, **(kwargs or {}))

    qkv = tokens(103, batch=len(lengths))
    ragged = {"key_lengths": torch.tensor(lengths)} if len(lengths) > 1 else {}
    layer.prefill(*(x[:, :70] for x in qkv), state, **ragged)
    for last in range(71, 104):
        query, key, value = (x[:, :last] for x in qkv)
        with Count() if last > 71 else nullcontext():
            layer.decode(query[:, -1:], key, value, state)
    assert len(counted) / 32 < most
