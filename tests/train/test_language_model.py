"""A run that was stopped at any moment ends bit for bit as one that was not."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.tasks.text import TextData
from dilated_attention_pytorch.train.checkpoint import list_checkpoints, load_checkpoint
from dilated_attention_pytorch.train.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
    TrainingError,
)
from dilated_attention_pytorch.train.loop import LoopSettings, TextSettings, TrainingLoop
from forked import forking

CONFIG = AdaptiveConfig(block_size=8, base_sparsity=0.5, query_scope="past", hidden_dim=4)
RUN = LanguageModelRun(
    config=CONFIG, dim=16, num_heads=2, num_layers=2, seq_len=64, batch_size=2, steps=12,
    validation_sequences=2, threads=1,
)  # fmt: skip
EVERY = LoopSettings(log_every=2, validate_every=4, checkpoint_every=3)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write_text(folder):
    path = folder / "text.txt"
    path.write_bytes(bytes((7 * n * n + n // 5) % 96 + 32 for n in range(6000)))
    return TextSettings(paths=(str(path),))


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def finish(loop):
    for _ in loop.run():
        pass
    return outcome(loop.folder)


def outcome(folder):
    """Everything that must not depend on interruptions: no times."""
    state = load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    training = {name: state["training"][name] for name in state["training"] if name != "seconds"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None), line.pop("tokens_per_second", None)
    return training, lines


def assert_same(one, two, path="state"):
    assert type(one) is type(two), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    elif isinstance(one, dict):
        assert list(one) == list(two), path
        for key in one:
            assert_same(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), path
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert one == two, path


@pytest.mark.parametrize("attention", ["adaptive", "dense", "local"])
def test_stopping_after_every_step_changes_nothing(tmp_path, text, attention):
    run = dataclasses.replace(RUN, attention=attention)
    whole = finish(TrainingLoop.start(tmp_path / "whole", run, text, EVERY))
    loop = TrainingLoop.start(tmp_path / "cut", run, text, EVERY)
    while not loop.training.done:
        next(iter(loop.run(lambda: True)), None)
        loop.save()
        torch.manual_seed(99)
        loop = TrainingLoop.resume(tmp_path / "cut")
    assert_same(outcome(tmp_path / "cut"), whole)
    steps = [line["step"] for line in whole[1]]
    assert steps == [0, 2, 4, 6, 8, 10, 12]
    assert (whole[1][1]["sparsity"] is None) == (attention == "dense")


def killing(function, calls):
    """The function, which kills its process when it is called for the so manyth time."""
    count = 0

    def wrapper(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapper


def train_until_killed(folder, text, where):
    """What a process of its own does."""
    if where == "optimizer":
        torch.optim.AdamW.step = killing(torch.optim.AdamW.step, 8)
    elif where == "rename":
        os.replace = killing(os.replace, 4)
    elif where == "sync":
        os.fsync = killing(os.fsync, 11)
    loop = TrainingLoop.start(folder, RUN, text, EVERY)
    for progress in loop.run():
        if where == "boundary" and progress.result.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return finish(TrainingLoop.start(folder / "run", RUN, write_text(folder), EVERY))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["boundary", "optimizer", "rename", "sync"])
def test_killed_at_a_bad_moment_and_resumed_equals_uninterrupted(tmp_path, text, where, whole):
    folder = tmp_path / "cut"
    process = forking().Process(target=train_until_killed, args=(folder, text, where))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    loop = TrainingLoop.resume(folder)
    assert 0 < loop.training.step_count < RUN.steps
    assert_same(finish(loop), whole)
    assert not list(folder.rglob("*.tmp"))


def test_a_run_is_not_overwritten_and_other_settings_are_refused(tmp_path, text):
    loop = TrainingLoop.start(tmp_path / "run", RUN, text, EVERY)
    with pytest.raises(FileExistsError, match="--resume"):
        TrainingLoop.start(tmp_path / "run", RUN, text, EVERY)
    with pytest.raises(ValueError, match="steps is 12 there and 13 here"):
        TrainingLoop.resume(tmp_path / "run", changes={"steps": 13})
    TrainingLoop.resume(tmp_path / "run", changes={"steps": 12, "config.num_layers": 1})
    with open(text.paths[0], "a") as file:
        file.write("more")
    with pytest.raises(ValueError, match=r"text .* has changed"):
        TrainingLoop.resume(tmp_path / "run")
    assert loop.checkpoints.is_dir()


def data():
    bytes_ = (torch.arange(4000) * 37 % 113).to(torch.uint8)
    return TextData(bytes_, bytes_[:500], ("a",), ("b",), "numbers")


def test_a_loss_that_is_not_finite_ends_training_with_a_reason():
    training = LanguageModelTraining(dataclasses.replace(RUN, attention="dense"), data())
    training.step()
    with torch.no_grad():
        next(training.model.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        training.step()


def test_later_bytes_do_not_reach_earlier_predictions():
    model = LanguageModelTraining(RUN, data()).model.eval()
    x = torch.randint(0, 256, (1, 64))
    changed = x.clone()
    changed[:, 37:] = (changed[:, 37:] + 11) % 256
    with torch.no_grad():
        assert torch.equal(model(x)[:, :37], model(changed)[:, :37])


def test_the_sparsity_loss_reaches_the_budget():
    gains = {}
    for weight in (0.0, 5.0):
        config = dataclasses.replace(CONFIG, selector_weight=0.0)
        run = dataclasses.replace(RUN, sparsity_weight=weight, config=config)
        training = LanguageModelTraining(run, data())
        layer = training.model.blocks[0].attention
        training.step()
        gains[weight] = layer.budget_gain.grad
    assert gains[0.0] is None or not gains[0.0].any()
    assert gains[5.0].any()


def test_the_temperature_falls_over_a_quarter_of_the_steps():
    training = LanguageModelTraining(RUN, data())
    temperatures = [training.step().temperature for _ in range(5)]
    assert temperatures[0] == 1.0
    assert temperatures[3] == pytest.approx(0.1)
    assert temperatures == sorted(temperatures, reverse=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "none"}, {"dim": 0}, {"dim": 18, "num_heads": 4}, {"steps": 0},
        {"learning_rate": float("nan")}, {"annealing_share": 0.0}, {"seed": -1},
        {"weight_decay": -1.0}, {"sparsity_weight": float("inf")},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(RUN, **changes)


def test_a_missing_device_is_named():
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        LanguageModelTraining(dataclasses.replace(RUN, device="cuda:99"), data())
