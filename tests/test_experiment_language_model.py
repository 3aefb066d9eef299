"""The language-model experiment: equal budgets, equal starts, and steps as CUDA graphs."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dilated_attention_pytorch.models import rotary_table

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
METHODS = ("adaptive", "local", "dilated", "strided", "hierarchical", "sink_local", "random",
           "mean_pooled")  # fmt: skip
# From inside of torch.compile.
COMPILER_WARNINGS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("language_model_training")


def text() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (20_000,), dtype=torch.uint8, generator=generator)


def start(training: ModuleType, attention: str, device: str = "cpu", **settings: Any) -> Any:
    sparsity = 0.0 if attention == "dense" else 0.9
    settings = {"attention": attention, "sparsity": sparsity, **settings}
    return training.Training(settings, training.QUICK.of(settings), text(), 0, device)


def test_blocks_per_row(training: ModuleType) -> None:
    # 128 blocks see 8,256 tiles: six each take 753 of 825.6, seven 875.
    assert [training.blocks_per_row(s, 128) for s in (0.8, 0.9, 0.95)] == [13, 6, 3]
    assert training.kept_tiles(6, 128) == 753
    assert training.blocks_per_row(0.0, 128) == 128


def test_all_sparse_methods_read_as_many_tiles(training: ModuleType) -> None:
    windows = text()[: 2 * 1025].view(2, 1025).long()
    expected = 1 - training.kept_tiles(3, 64) / (64 * 65 / 2)
    for method in METHODS:
        measured = training.measure(start(training, method).model, windows, "cpu")
        assert measured["sparsity"] == pytest.approx(expected), method
    window = training.measure(start(training, "flex_window").model, windows, "cpu")["sparsity"]
    i = torch.arange(1024)[:, None]
    kept = ((i >= i.T) & (i - i.T < 3 * 16)).sum()
    assert window == pytest.approx(1 - float(kept) / (1024 * 1025 / 2))


def test_all_methods_of_a_seed_start_alike_and_read_the_same(training: ModuleType) -> None:
    dense, adaptive = start(training, "dense"), start(training, "adaptive")
    for name, weight in dense.model.state_dict().items():
        assert torch.equal(weight, adaptive.model.state_dict()[name])
    assert torch.equal(dense.windows.next_batch(2), adaptive.windows.next_batch(2))


def test_other_batches_hold_as_many_bytes(training: ModuleType) -> None:
    size = training.FULL.of({"batch_size": 8})
    assert (size.batch_size, size.steps) == (8, 1530)


@pytest.mark.parametrize(
    ("longer", "expected"),
    [(1, (8192, 4, 3060)), (4, (32768, 1, 3060)), (8, (65536, 1, 1530))],
)
def test_longer_windows_hold_as_many_bytes(
    training: ModuleType, longer: int, expected: tuple[int, int, int]
) -> None:
    size = training.FULL.of({"longer": longer})
    assert (size.seq_len, size.batch_size, size.steps) == expected


def test_every_selector_learns(training: ModuleType) -> None:
    trial = start(training, "adaptive")
    before = [p.clone() for p in trial.selectors]
    for _ in range(2):
        trial.step()
    weights = zip(before, trial.selectors, strict=True)
    assert all(not torch.equal(a, b) for a, b in weights)


def test_later_bytes_change_no_earlier_choice(training: ModuleType) -> None:
    first = text()[:1024].long()[None]
    second = first.clone()
    second[:, 512:] = 255 - second[:, 512:]
    for method in ("adaptive", "mean_pooled"):
        model = start(training, method).model.eval()
        infos = zip(model.patterns(first), model.patterns(second), strict=True)
        for a, b in infos:
            # The choice of the block in which they begin sees its first byte.
            same = [x["pattern"].to_dense()[:, :, :32] for x in (a, b)]
            assert torch.equal(*same)


@pytest.fixture
def compiling(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts graphs; they are traced but not built, which needs no compiler and is fast."""
    traced = partial(training.compile_blocks, backend="aot_eager")
    monkeypatch.setattr(training, "compile_blocks", traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@COMPILER_WARNINGS
@pytest.mark.parametrize("method", ["dense", "adaptive"])
def test_compiled_steps_train_like_eager_ones(
    training: ModuleType, compiling: Any, method: str
) -> None:
    losses = {}
    for compiled in (False, True):
        trial = start(training, method, compile=compiled)
        losses[compiled] = torch.stack([trial.step() for _ in range(2)])
        training.measure(trial.model, text()[:1025].long()[None], "cpu")
    torch.testing.assert_close(losses[True], losses[False])
    # Both blocks, all steps: what lies before attention and what lies after it.
    assert compiling["unique_graphs"] == 2


@COMPILER_WARNINGS
def test_compiled_blocks_keep_dtypes_under_autocast(training: ModuleType, compiling: Any) -> None:
    seen = {}
    for compiled in (False, True):
        block = start(training, "adaptive", compile=compiled).model.blocks[0]
        x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v, unrotated = block.before_attention(x, rotary_table(64, 16, x.device), True)
            seen[compiled] = [q, k, v, *unrotated, block.after_attention(x, v)]
    assert compiling["unique_graphs"] == 2
    assert [y.dtype for y in seen[True]] == 5 * [torch.bfloat16] + [torch.float32]
    for y, expected in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(y, expected)
        assert y.stride(-1) == 1


@COMPILER_WARNINGS
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["dense", "adaptive", "local", "mean_pooled"])
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_steps_train_like_launched_ones(
    training: ModuleType, method: str, compiled: bool
) -> None:
    losses = {}
    for graph in (False, True):
        trial = start(training, method, "cuda", graph=graph, compile=graph and compiled)
        losses[graph] = torch.stack([trial.step() for _ in range(8)])
    # Exploration draws other random blocks; dense and fixed patterns draw none. Compiled kernels
    # round to bfloat16 less often.
    margin = 0.05 if method == "adaptive" else 0.02 if compiled else 0.005
    torch.testing.assert_close(losses[True], losses[False], atol=margin, rtol=0)
    assert losses[True][-1] < losses[True][0]
