"""The callbacks inside real trainers: schedules, metrics, stopping and going on."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import (
    AdaptiveConfig,
    AdaptiveSparsityTrainer,
    BlockSparseAdaptive,
)
from dilated_attention_pytorch.train.monitor import SparsityMonitor, default_schedules

ROOT = Path(__file__).parents[2]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = AdaptiveConfig(block_size=16, base_sparsity=0.6, budget="fixed")
        self.enter = nn.Linear(4, 16)
        self.layer = BlockSparseAdaptive(num_heads=2, head_dim=8, adaptive_config=config)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.enter(x).unflatten(-1, (2, 8))
        out = self.layer(x, x, x, is_causal=True).flatten(2)
        return {"loss": out.square().mean(), "logits": out}


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        return {"x": torch.randn(128, 4, generator=generator), "labels": torch.zeros(())}


class Stream(torch.utils.data.IterableDataset):
    """Without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (Data()[number] for number in range(16))


class Writer:
    def __init__(self) -> None:
        self.lines: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.lines.append((tag, scalar_value, global_step))


def schedules() -> AdaptiveSparsityTrainer:
    return AdaptiveSparsityTrainer(
        annealing_steps=8, dense_steps=2, sparsity_warmup_steps=4, initial_sparsity=0.0
    )


# By step: temperature and base sparsity in force after it.
EXPECTED = []
_layer = Model().layer
_trainer = schedules()
_trainer.attach(_layer)
for _ in range(8):
    _trainer.step()
    EXPECTED.append((float(_layer.temperature), float(_layer.base_sparsity)))


class Spy:
    """Notes the layer's settings after every optimiser step."""

    def __init__(self, layer: BlockSparseAdaptive) -> None:
        self.layer, self.seen = layer, []

    def note(self) -> None:
        self.seen.append((float(self.layer.temperature), float(self.layer.base_sparsity)))


def test_monitor_measures_training_passes_and_writes() -> None:
    model, writer = Model(), Writer()
    monitor = SparsityMonitor(schedules(), every=2, writer=writer)
    monitor.start(model)
    x = torch.randn(2, 128, 4)
    results = []
    for _ in range(4):
        model(x)["loss"].backward()
        model.eval()
        model(x)
        model.train()
        results.append(monitor.step())
    assert [x is None for x in results] == [True, False, True, False]
    assert results[1]["sparsity/temperature"] == pytest.approx(EXPECTED[1][0])
    # Dense for two steps: every tile is computed.
    assert results[1]["sparsity/layer"] == 0
    assert 0 < results[3]["sparsity/layer"] < 0.6
    assert results[3]["sparsity/mean"] == results[3]["sparsity/layer"]
    assert {step for _, _, step in writer.lines} == {2, 4}
    assert len(writer.lines) == 6
    monitor.stop()
    assert not model.layer.observed
    with pytest.raises(ValueError, match="every"):
        SparsityMonitor(schedules(), every=0)
    with pytest.raises(ValueError, match="BlockSparseAdaptive"):
        monitor.start(nn.Linear(2, 2))


def test_a_training_that_failed_leaves_generation_alone() -> None:
    """Nobody calls stop(): the layer decodes, and its copies train, as if nobody had watched."""
    model = Model()
    monitor = SparsityMonitor(AdaptiveSparsityTrainer(annealing_steps=9), every=1)
    monitor.start(model)
    assert model.layer.observed
    assert not model.eval().layer.observed
    assert not copy.deepcopy(model).train().layer.observed


def test_monitor_goes_on_where_it_was() -> None:
    model, monitor = Model(), SparsityMonitor(schedules())
    monitor.start(model)
    for _ in range(3):
        monitor.step()
    other, again = Model(), SparsityMonitor(schedules())
    again.load_state_dict(monitor.state_dict())
    again.start(other)
    assert float(other.layer.temperature) == pytest.approx(EXPECTED[2][0])
    again.start(other, step=5)
    assert float(other.layer.temperature) == pytest.approx(EXPECTED[4][0])


def test_an_unknown_number_of_steps_has_no_quarter() -> None:
    assert default_schedules(400).annealing_steps == 100
    # Nothing to train is no error.
    assert default_schedules(0).annealing_steps == 1
    for steps in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"AdaptiveSparsityTrainer\(annealing_steps=\.\.\.\)"):
            default_schedules(steps)


@pytest.mark.slow
def test_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from dilated_attention_pytorch.train.hf_trainer import AdaptiveSparsityCallback

    def run(
        steps: int, resume: bool, callback: Any = None, folder: str = "out"
    ) -> tuple[Model, list[Any], Any]:
        model = Model()
        spy = Spy(model.layer)

        class Note(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **others: Any) -> None:
                spy.note()

            def on_log(self, *args: Any, logs: dict[str, float], **others: Any) -> None:
                shown.append(logs)

        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, save_steps=3, logging_steps=1, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=0, lr_scheduler_type="constant",
            remove_unused_columns=False,
        )  # fmt: skip
        own = AdaptiveSparsityCallback(schedules(), every=1) if callback is None else callback
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Data(), callbacks=[own, Note()]
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, spy.seen, trainer

    shown: list[dict[str, float]] = []
    whole, seen, trainer = run(6, False)
    assert seen == EXPECTED[:6]
    # What callbacks such as TensorBoard's show.
    temperatures = [line["sparsity/temperature"] for line in shown if "loss" in line]
    assert temperatures == pytest.approx([temperature for temperature, _ in EXPECTED[:6]])
    logged = [line for line in trainer.state.log_history if "sparsity/layer" in line]
    assert logged[-1]["sparsity/temperature"] == pytest.approx(EXPECTED[5][0])
    assert not whole.layer.observed
    run(3, False, folder="two")
    resumed, seen, _ = run(6, True, folder="two")
    assert seen == EXPECTED[3:6]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)
    with pytest.raises(ValueError, match="no known number of steps"):
        AdaptiveSparsityCallback().on_train_begin(
            trainer.args, transformers.TrainerState(max_steps=-1), trainer.control, model=whole
        )
    # Without schedules of its own: anneals over a quarter of the training, explores over three.
    _, seen, _ = run(4, False, AdaptiveSparsityCallback(), "three")
    assert [t for t, _ in seen] == pytest.approx([0.1, 0.1, 0.0, 0.0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="needs lightning")
    from dilated_attention_pytorch.train.lightning import AdaptiveSparsityCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()
            self.spy = Spy(self.model.layer)

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Module, *args: Any) -> None:
            if trainer.global_step > len(module.spy.seen) + module.skipped:
                module.spy.note()

    def run(
        steps: int, resume: Path | None, callback: Any = None, data: Any = None, **limits: int
    ) -> tuple[Module, Any]:
        module = Module()
        module.skipped = 0 if resume is None else 3
        callback = callback or AdaptiveSparsityCallback(schedules(), every=1)
        trainer = pl.Trainer(
            max_steps=steps, accumulate_grad_batches=2, callbacks=[callback, Note()],
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            **limits,
        )  # fmt: skip
        batches = torch.utils.data.DataLoader(data or Data(), batch_size=1)
        trainer.fit(
            module, batches, ckpt_path=resume, **({} if resume is None else {"weights_only": False})
        )
        return module, trainer

    whole, trainer = run(6, None)
    assert whole.spy.seen == EXPECTED[:6]
    assert trainer.callback_metrics["sparsity/temperature"].item() == pytest.approx(EXPECTED[5][0])
    _, trainer = run(3, None)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    resumed, _ = run(6, tmp_path / "three.ckpt")
    assert resumed.spy.seen == EXPECTED[3:6]
    # The checkpoint holds the schedules: the length of what follows does not matter.
    resumed, _ = run(6, tmp_path / "three.ckpt", AdaptiveSparsityCallback(), max_epochs=-1)
    assert resumed.spy.seen == EXPECTED[3:6]
    # A second training with the same callback begins anew.
    again = AdaptiveSparsityCallback(schedules())
    assert run(3, None, again)[0].spy.seen == run(3, None, again)[0].spy.seen == EXPECTED[:3]
    for data, limits in ((None, {"max_epochs": -1}), (Stream(), {}), (Stream(), {"max_epochs": 2})):
        with pytest.raises(ValueError, match="no known number of steps"):
            run(-1, None, AdaptiveSparsityCallback(), data, **limits)
    # Known again: one step of annealing.
    for data, limits in ((None, {"max_epochs": -1}), (Stream(), {})):
        seen = run(8, None, AdaptiveSparsityCallback(), data, **limits)[0].spy.seen
        temperatures = [temperature for temperature, _ in seen]
        assert temperatures == pytest.approx([0.1**0.5] + [0.1] * 4 + [0.0] * 3)


@pytest.mark.slow
def test_the_plain_loop_runs_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    result = subprocess.run(
        [sys.executable, ROOT / "examples/plain_loop.py", "--tensorboard", tmp_path],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    steps = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert steps == ["step 10", "step 20", "step 30", "step 40"]
    assert list(tmp_path.glob("events.out.*"))
