"""The language-model experiment: equal budgets, equal starts, and steps as CUDA graphs."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
METHODS = ("adaptive", "local", "dilated", "strided", "hierarchical", "sink_local", "random",
           "mean_pooled")  # fmt: skip


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["dense", "adaptive", "local", "mean_pooled"])
def test_replayed_steps_train_like_launched_ones(training: ModuleType, method: str) -> None:
    losses = {}
    for graph in (False, True):
        trial = start(training, method, "cuda", graph=graph)
        losses[graph] = torch.stack([trial.step() for _ in range(8)])
    # Exploration draws other random blocks; dense and fixed patterns draw none.
    margin = 0.05 if method == "adaptive" else 0.005
    torch.testing.assert_close(losses[True], losses[False], atol=margin, rtol=0)
    assert losses[True][-1] < losses[True][0]
