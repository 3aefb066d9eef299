"""Checkpoints are whole or not there, and checked before anything of them is taken up."""

from __future__ import annotations

import copy
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import AdaptiveConfig, AdaptiveSparsityTrainer, BlockSparseAdaptive
from dilated_attention_pytorch.config import from_plain
from dilated_attention_pytorch.tasks.text import TextData
from dilated_attention_pytorch.train.checkpoint import (
    CheckpointError,
    check_loop_state,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from dilated_attention_pytorch.train.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
)
from dilated_attention_pytorch.train.loop import TextSettings, check_model_state, load_saved_run
from dilated_attention_pytorch.train.run_folder import MetricsFile

STATE = {"weights": torch.arange(1000.0), "number": 3, "nested": {"list": [1, None, "x"]}}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    loaded = load_checkpoint(save_checkpoint(tmp_path, 7, STATE))
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert (loaded["step"], loaded["number"], loaded["nested"]) == (7, 3, STATE["nested"])


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 5, 20, 100):
        save_checkpoint(tmp_path, step, STATE)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, s) for s in (20, 100)]
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 100)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, 1, STATE)

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, 2, STATE)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 1)]
    assert load_checkpoint(newest_checkpoint(tmp_path))["number"] == 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "other"])
def test_damage_is_refused_and_the_previous_one_named(tmp_path, damage):
    save_checkpoint(tmp_path, 1, STATE)
    path = save_checkpoint(tmp_path, 2, STATE)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "one bit":
        place = content.index(torch.tensor(777.0).numpy().tobytes())
        content[place] ^= 1
    else:
        content = b"" if damage == "empty" else b"something else entirely"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.*Remove it to go on from step-00000001"):
        load_checkpoint(path)
    path.unlink()
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 1


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "step-00000003.pt"
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(path)
    torch.save({"format": "dilated_attention_pytorch.training", "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        newest_checkpoint(tmp_path / "none")


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-00000003.pt"
    torch.save({"bomb": _Bomb()}, path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_unfinished_files_are_removed_and_never_listed(tmp_path):
    save_checkpoint(tmp_path, 1, STATE)
    (tmp_path / "step-00000002.pt.4711.tmp").write_bytes(b"half")
    assert len(list_checkpoints(tmp_path)) == 1
    folder = tmp_path / ".dilated-attention-0123456789abcdef.tmp"
    folder.mkdir()
    (folder / "half.bin").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.start()
    for step in (0, 10, 20, 30):
        metrics.append({"step": step, "loss": 1 / (step + 1)})
    with open(metrics.path, "a") as file:
        file.write('{"step": 40, "lo')
    assert metrics.rewind(10) == 3
    assert [line["step"] for line in metrics.read()] == [0, 10]
    assert metrics.path.read_text().endswith("\n")


RUN = LanguageModelRun(
    config=AdaptiveConfig(block_size=16, query_scope="past", hidden_dim=4),
    dim=16, num_heads=1, num_layers=1, seq_len=32, batch_size=1, threads=1, steps=4,
)  # fmt: skip


def training() -> LanguageModelTraining:
    before = torch.get_num_threads()
    data = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0)).byte()
    made = LanguageModelTraining(RUN, TextData(data, data, (), (), "random bytes"))
    torch.set_num_threads(before)
    return made


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    made = training()
    made.step()
    return {
        "loop": {
            "run": RUN.to_dict(),
            "text": {"paths": None, "validation_share": 0.05, "max_bytes": None},
            "intervals": {"log_every": 1, "validate_every": 1, "checkpoint_every": 1},
        },
        "fingerprint": "ab",
        "latest": {"validation_loss": 1.0, "validation_sparsity": None},
        "losses": [1.0],
        "loss_seconds": 0.5,
        "training": copy.deepcopy(made.state_dict()),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value at a place; the key is taken out if it is Ellipsis."""
    tree = copy.copy(tree)
    if len(path) > 1:
        tree[path[0]] = replaced(tree[path[0]], path[1:], value)
    elif value is ...:
        del tree[path[0]]
    else:
        tree[path[0]] = value
    return tree


GROUP = ("optimizer", "param_groups", 0)
MOMENT = ("optimizer", "state", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model",), ...),
        (("model",), []),
        (("model", "embedding.weight"), ...),
        (("model", "embedding.weight"), torch.zeros(2, 2)),
        (("model", "extra"), torch.zeros(1)),
        (("model", "blocks.0.attention.budget_state"), torch.full((66, 5), 3.0)),
        (("optimizer",), {}),
        (("optimizer", "state", 10**6), {}),
        ((*GROUP, "params"), [5]),
        ((*GROUP, "lr"), float("nan")),
        ((*GROUP, "betas"), (2.0, 2.0)),
        ((*GROUP, "weight_decay"), ...),
        ((*MOMENT, "step"), torch.tensor(-1.0)),
        ((*MOMENT, "exp_avg"), torch.zeros(3)),
        ((*MOMENT, "exp_avg_sq"), ...),
        (("trainer",), None),
        (("trainer", "schedule"), "sudden"),
        (("trainer", "current_step"), -1),
        (("trainer", "arrivals"), []),
        (("trainer", "arrivals"), [-99]),
        (("trainer", "arrivals"), (0,)),
        (("trainer", "arrivals"), [0.5]),
        (("trainer", "annealing_steps"), 0),
        (("data_position",), "0"),
        (("data_position",), -1),
        (("step_count",), 1.5),
        (("seconds",), float("inf")),
        (("random",), torch.zeros(5056, dtype=torch.uint8)),
        (("random",), torch.zeros(3, dtype=torch.uint8)),
        (("random",), None),
        (("random_cuda",), torch.zeros(16, dtype=torch.uint8)),
        (("surprise",), 1),
    ],
)
def test_a_state_is_taken_up_whole_or_not_at_all(
    path: tuple[Any, ...], value: Any, state: dict[str, Any]
) -> None:
    made = training()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(CheckpointError):
        made.load_state_dict(replaced(state["training"], path, value))
    assert same(before, made.state_dict())
    made.load_state_dict(copy.deepcopy(state["training"]))
    assert same(state["training"], made.state_dict())


def test_a_state_from_before_heads_were_measured_goes_on(state: dict[str, Any]) -> None:
    old, made = copy.deepcopy(state["training"]), training()
    names = [name for name in old["model"] if name.endswith(".budget_state")]
    for name in names:
        old["model"][name] = old["model"][name][:, :5].clone()
    made.load_state_dict(old)
    assert names
    for name in names:
        assert torch.equal(made.state_dict()["model"][name][:, :5], old["model"][name])


def test_weights_that_are_no_numbers_are_refused(state: dict[str, Any]) -> None:
    name = next(iter(state["training"]["model"]))
    value = state["training"]["model"][name]
    for odd in (value.to(torch.int8), value.double(), torch.full_like(value, torch.nan)):
        with pytest.raises(CheckpointError, match=name):
            training().load_state_dict(replaced(state["training"], ("model", name), odd))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("loop",), ..., "has no loop"),
        (("training",), [], "training in the checkpoint"),
        (("fingerprint",), 3, "must be a string"),
        (("latest",), {"x": "y"}, "latest"),
        (("losses",), [float("nan")], "losses"),
        (("losses",), "abc", "losses"),
        (("loss_seconds",), -1.0, "loss_seconds"),
        (("training", "step_count"), 7, "step"),
        (("training", "step_count"), torch.zeros(3), "step"),
    ],
)
def test_what_a_loop_could_not_have_written_is_refused(
    path: tuple[Any, ...], value: Any, words: str, state: dict[str, Any]
) -> None:
    whole = {**state, "step": 1}
    check_loop_state(whole, "loop", Path("x.pt"))
    with pytest.raises(CheckpointError, match=words):
        check_loop_state(replaced(whole, path, value), "loop", Path("x.pt"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run", "num_layers"), 10**7),
        (("run", "dim"), 10**9),
        (("run", "dim"), [16]),
        (("run", "dim"), 32),
        (("run", "config", "num_layers"), 10**7),
        (("run", "config"), None),
        (("run", "surprise"), 1),
        (("run",), ...),
        (("text", "paths"), 3),
        (("text",), "x"),
    ],
)
def test_settings_of_others_build_nothing(
    path: tuple[Any, ...], value: Any, state: dict[str, Any], tmp_path: Path
) -> None:
    changed = {**state, "loop": replaced(state["loop"], path, value)}
    save_checkpoint(tmp_path / "checkpoints", 1, changed)
    with pytest.raises(CheckpointError) as caught:
        load_saved_run(tmp_path)
    assert len(str(caught.value)) < 2000


def test_a_model_of_any_size_is_refused_before_it_is_made(state: dict[str, Any]) -> None:
    from dataclasses import replace

    huge = replace(RUN, dim=2**16, num_layers=200)
    with pytest.raises(CheckpointError, match="does not fit"):
        check_model_state(huge, state)
    check_model_state(RUN, state)


def test_archives_that_unpack_to_more_are_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"weights": torch.zeros(2**20)})
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    assert len(packed.getvalue()) < 2**16
    path.write_bytes(packed.getvalue())
    with pytest.raises(CheckpointError, match="not stored as they are"):
        load_checkpoint(path)


@pytest.mark.parametrize("step", [-1, 1.0, "1", None, 2**70, True])
def test_the_step_is_one(step: Any, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    kind = {"format": "dilated_attention_pytorch.training", "version": 2}
    torch.save({**kind, "step": step}, path)
    with pytest.raises(CheckpointError, match="its step is"):
        load_checkpoint(path)
    for version in (True, 2.0, "2", [2]):
        torch.save({**kind, "version": version, "step": 1}, path)
        with pytest.raises(CheckpointError, match="has version"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("current_step", "3"), ("current_step", -1),
        ("annealing_steps", 0), ("annealing_steps", 1.5), ("initial_temperature", "1"),
        ("initial_temperature", float("nan")), ("final_temperature", -1.0),
        ("initial_sparsity", 1.0), ("schedule", ["linear"]), ("dense_steps", 0.5),
        ("initial_temperature", 10**400), ("arrivals", None), ("arrivals", (0,)), ("arrivals", []),
        ("arrivals", [-3]), ("arrivals", [True]),
    ],
)  # fmt: skip
def test_schedules_are_taken_up_whole_or_not_at_all(name: str, value: Any) -> None:
    layer = BlockSparseAdaptive(num_heads=1, head_dim=8)
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=4)
    trainer.step()
    before, temperature = trainer.state_dict(), float(layer.temperature)
    with pytest.raises((TypeError, ValueError), match=name):
        trainer.load_state_dict({**before, name: value})
    assert trainer.state_dict() == before
    assert float(layer.temperature) == temperature
    trainer.load_state_dict({**before, "current_step": 4})
    assert float(layer.temperature) == pytest.approx(0.1)


def test_settings_take_plain_values_alone() -> None:
    assert from_plain(TextSettings, {"paths": ["a"]}).paths == ("a",)
    for values in ([], None, "x", 3):
        with pytest.raises(TypeError, match="mapping"):
            from_plain(TextSettings, values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown keys"):
        from_plain(TextSettings, {3: 1, "x": 2})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="an entry of paths must be a string"):
        from_plain(TextSettings, {"paths": [3]})
