"""Results do not depend on torch's default dtype and device, which belong to the user."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dilated_attention_pytorch
from dilated_attention_pytorch import (
    AdaptiveConfig,
    AdaptiveSparsityTrainer,
    BlockSparseAdaptive,
    fixed_pattern,
    get_sparsity_loss,
)
from dilated_attention_pytorch.analysis import HeadStatistics, head_statistics, record
from dilated_attention_pytorch.config import ESTIMATORS, SCORERS
from dilated_attention_pytorch.nn.baselines import (
    FIXED_PATTERNS,
    METHODS,
    BlockSparseTrainingFree,
    TrainingFreeConfig,
)
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.selection.threshold import ThresholdTable
from dilated_attention_pytorch.selection.top_k import gumbel_noise
from dilated_attention_pytorch.tasks.needle import NeedleTask
from dilated_attention_pytorch.tasks.text import TextWindows

SOURCE = Path(dilated_attention_pytorch.__file__).parent
OTHERS = (torch.bfloat16, torch.float16, torch.float64)
# The functions that make floating-point numbers unless they are told otherwise.
FLOATS = {"empty", "eye", "full", "linspace", "normal", "ones", "rand", "randn", "tensor", "zeros"}
MAKERS = FLOATS | {"arange", "randint", "randperm"}
LAYERS: dict[str, dict[str, Any]] = {
    **{f"scorer {name}": {"scorer": name} for name in SCORERS},
    **{f"estimator {name}": {"estimator": name} for name in ESTIMATORS},
    "fixed": {"budget": "fixed", "num_explore_blocks": 1},
    "threshold": {"budget": "threshold", "threshold_floor": 0.5, "num_sink_blocks": 1},
    "past": {"query_scope": "past", "num_local_blocks": 1},
    "hierarchy": {"hierarchy": (2,), "hierarchy_keep": 2, "num_explore_blocks": 1},
}


@contextmanager
def defaults(dtype: torch.dtype, device: str = "cpu") -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def inputs(length: int = 90) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 2, 8, generator=generator, dtype=torch.float32, device="cpu")


def check(compute: Callable[[], Any]) -> None:
    """The same, bit for bit, under every default dtype and another default device."""
    wanted = compute()
    for dtype in OTHERS:
        with defaults(dtype, "meta"):
            found = compute()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def settings(name: str) -> AdaptiveConfig:
    return AdaptiveConfig(
        **{"block_size": 8, "base_sparsity": 0.7, "hidden_dim": 4, **LAYERS[name]}
    )


@pytest.mark.parametrize("name", LAYERS)
def test_training_and_generation(name: str) -> None:
    torch.manual_seed(0)
    first_layer = BlockSparseAdaptive(num_heads=2, head_dim=8, adaptive_config=settings(name))
    if first_layer.config.budget == "threshold":
        first_layer.set_thresholds(ThresholdTable((20, 60), (0.3, 0.1)))

    def compute() -> list[Tensor]:
        # A pass in training moves the budgets of its layer.
        layer = copy.deepcopy(first_layer)
        torch.manual_seed(3)
        x = inputs().requires_grad_()
        out = layer.train()(x, x, x, is_causal=True)
        loss = out.square().mean() + get_sparsity_loss(layer)
        found = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
        layer.eval()
        with torch.no_grad():
            if layer.config.hierarchy:
                return [out.detach(), *(g for g in found if g is not None)]
            state, before = SelectorState(), x[:, :-1]
            first = layer.prefill(before, before, before, state)
            last = layer.decode(x[:, -1:], x, x, state)
        return [out.detach(), first, last, *(g for g in found if g is not None)]

    check(compute)


@pytest.mark.parametrize(
    # Without scores there is nothing to compare with a threshold.
    ("method", "budget"),
    [(m, "fixed") for m in METHODS] + [(m, "threshold") for m in METHODS if m != "sink_window"],
)
def test_training_free_selection(method: str, budget: str) -> None:
    config = TrainingFreeConfig(method=method, budget=budget, block_size=8, base_sparsity=0.7)
    layer = BlockSparseTrainingFree(config, num_heads=2, head_dim=8)
    if budget == "threshold":
        layer.set_thresholds(ThresholdTable((20, 60), (0.3, 0.1)))
    check(lambda: layer(inputs(), inputs(), inputs(), is_causal=True))


def test_fixed_patterns() -> None:
    def compute() -> list[Tensor]:
        patterns = (fixed_pattern(n, 200, block_size=8, num_heads=3) for n in FIXED_PATTERNS)
        return [pattern.to_dense() for pattern in patterns]

    check(compute)


def test_a_report_of_heads() -> None:
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=8, base_sparsity=0.7)
    layer = BlockSparseAdaptive(num_heads=2, head_dim=8, adaptive_config=config).eval()
    x = inputs(160)

    def heads() -> list[HeadStatistics]:
        return head_statistics(record(layer, [x]))[0]

    check(lambda: [[x for x in vars(head).values() if isinstance(x, float)] for head in heads()])
    batches = [x, x.flip(0)]
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=9)
    check(lambda: trainer.analyze_patterns(batches))


def test_tasks_draw_the_same() -> None:
    task = NeedleTask(seq_len=64, num_keys=16, target="mixed")
    check(lambda: vars(task.batch(2, torch.Generator("cpu").manual_seed(0))))
    data = torch.arange(100).to(torch.uint8)
    check(lambda: TextWindows(data, 9, 0).next_batch(20))


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_layers_are_made_in_every_dtype(scorer: str, dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        config = settings(f"scorer {scorer}")
        return BlockSparseAdaptive(num_heads=2, head_dim=8, adaptive_config=config)

    wanted = dict(make().named_parameters())
    with defaults(dtype):
        layer = make()
        assert layer(*(inputs().to(dtype),) * 3, is_causal=True).isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == dtype, name
        if scorer == "low_rank" and dtype != torch.float64:
            # Drawn in float32, as half precision has no decomposition.
            torch.testing.assert_close(parameter, wanted[name].to(dtype), rtol=0, atol=0)


def test_noise_is_finite_under_a_default_of_half_precision() -> None:
    # A quarter of a million draws: in bfloat16 some are exactly 1.
    with defaults(torch.bfloat16):
        noise = gumbel_noise(inputs(1).expand(2, 8192, 2, 8))
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.std()) == pytest.approx(math.pi / 6**0.5, abs=0.02)


def test_whatever_makes_numbers_says_their_dtype_and_device() -> None:
    """Parameters alone follow the defaults."""
    silent = []
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        parameters = {
            inner
            for call in calls
            if ast.unparse(call.func) == "nn.Parameter"
            for inner in ast.walk(call)
        }
        for call in set(calls) - parameters:
            module, _, name = ast.unparse(call.func).rpartition(".")
            if module != "torch" or name not in MAKERS:
                continue
            given = {keyword.arg for keyword in call.keywords}
            needed = {"device", "dtype"} if name in FLOATS else {"device"}
            if not needed <= given:
                place = f"{path.relative_to(SOURCE)}:{call.lineno}"
                silent.append(f"{place}: {ast.unparse(call)} without {sorted(needed - given)}")
    assert not silent, "\n".join(silent)
