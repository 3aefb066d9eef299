"""A training in a folder: metrics, checkpoints, stopping at any moment and going on exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from dilated_attention_pytorch.config import check_types, from_plain, to_plain
from dilated_attention_pytorch.foreign_text import PLACE, short_repr
from dilated_attention_pytorch.models import Transformer
from dilated_attention_pytorch.tasks.text import (
    TextData,
    TextError,
    load_text,
    read_bytes,
    validation_windows,
)
from dilated_attention_pytorch.train.checkpoint import (
    CheckpointError,
    check_form,
    check_loop_state,
    checkpoint_settings,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from dilated_attention_pytorch.train.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
    StepResult,
    build_language_model,
)
from dilated_attention_pytorch.train.run_folder import MARK, MetricsFile, check_named, make_mark

METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How often to do what, in steps.

    Attributes:
        log_every: Write a line of metrics.
        validate_every: Measure on the held-out text; also before the first step and at the end.
        checkpoint_every: Write a checkpoint; also before the first step and at the end.
    """

    log_every: int = 10
    validate_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Checks the numbers."""
        check_types(self)
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


# What is trained, and on what; FolderLoop says what it asks of them.
Model = TypeVar("Model", bound=Any)
Data = TypeVar("Data", bound=Any)


@dataclass(frozen=True)
class Progress:
    """What happened in a step.

    Attributes:
        result: What the training's ``step`` returned.
        tokens_per_second: Of the step; None where the clock stood still.
        measured: On the held-out text, as in the metrics, if it was measured now.
    """

    result: Any
    tokens_per_second: float | None
    measured: dict[str, Any] | None


class FolderLoop(ABC, Generic[Model, Data]):
    """Trains in a folder; subclasses say what, and add ways to start and to go on.

    One at a time may write into a folder: the commands hold it with :func:`lock_folder`, and so
    should a program of one's own.

    Args:
        folder: Where metrics and checkpoints go.
        intervals: How often to log, to measure and to save.
        text: What is trained on: its ``source`` in words, and a ``fingerprint()`` that changes with
            every byte.
        training: Model, optimiser and all else that its ``state_dict()`` holds and its
            ``load_state_dict()`` takes up. It has its settings ``run`` (``batch_size`` and
            ``seq_len`` among them), ``step()``, ``done``, ``step_count`` and ``seconds``.

    Attributes:
        metrics: Lines with ``step``, ``loss`` (mean of the steps since the line before),
            ``seconds``, ``tokens_per_second``, and where it was measured the values of
            :meth:`measure`.
        latest: The latest such values.
    """

    # Under which name a checkpoint holds the settings, and which command writes it.
    KEY: ClassVar[str]
    COMMAND: ClassVar[str]

    def __init__(self, folder: Path, intervals: LoopSettings, text: Data, training: Model) -> None:
        self.folder, self.intervals = folder, intervals
        self.text, self.training = text, training
        self.metrics = MetricsFile(folder / METRICS_NAME)
        self.latest: dict[str, Any] = {}
        # Losses and seconds since the last line of metrics.
        self._losses: list[float] = []
        self._seconds = 0.0

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must say to build the loop again, as plain values."""

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Measures on the held-out text; changes nothing."""

    @abstractmethod
    def values(self, result: Any) -> dict[str, Any]:
        """The step's ``loss`` and ``seconds``, and what else a line of metrics holds of it."""

    def inputs(self) -> dict[str, str]:
        """A digest of everything that is read beside the text, by what it is."""
        return {}

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.folder / CHECKPOINTS_NAME

    @property
    def measured_at(self) -> int:
        """The step of :attr:`latest`."""
        step, every = self.training.step_count, self.intervals.validate_every
        return step if self.training.done else step // every * every

    @staticmethod
    def check_new(folder: Path) -> None:
        """Raises FileExistsError if a folder holds a run."""
        if list_checkpoints(folder / CHECKPOINTS_NAME):
            raise FileExistsError(
                f"{folder} already holds a run. Add --resume to go on with it, or choose another "
                "--out."
            )

    def begin(self) -> None:
        """Measures, and writes the first line of metrics and the checkpoint of step 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        self.metrics.start()
        self.latest = self.measure()
        self.metrics.append({"step": 0, **self.latest})
        self.save()

    @classmethod
    def read_newest(cls, folder: Path) -> dict[str, Any]:
        """The newest checkpoint of a folder.

        Raises:
            CheckpointError: If there is no intact one, or another command wrote it.
        """
        path = newest_checkpoint(folder / CHECKPOINTS_NAME)
        state = load_checkpoint(path)
        if cls.KEY not in state:
            raise CheckpointError(f"{path} is not a checkpoint of {cls.COMMAND}.")
        check_loop_state(state, cls.KEY, path)
        return state

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Takes up the state of a checkpoint, and the metrics up to it.

        Raises:
            CheckpointError: If the text, or a model that is read, has changed.
        """
        found, saved = self.inputs(), state.get("inputs", {})
        for name in sorted({*found, *saved}):
            own, other = found.get(name, "none"), saved.get(name, "none")
            if own != other:
                raise CheckpointError(
                    f"the {name} has changed since the checkpoint of step {state['step']} in "
                    f"{self.folder}: its digest was {other[:16]}, and is now {own[:16]}. Going on "
                    "would not give the same result. Restore it, or start a new run with another "
                    "--out."
                )
        if self.text.fingerprint() != state["fingerprint"]:
            raise CheckpointError(
                f"the text ({self.text.source}) has changed since the checkpoint of step "
                f"{state['step']} in {self.folder}; going on would not give the same result. "
                "Restore it, or start a new run with another --out."
            )
        self.training.load_state_dict(state["training"])
        self.latest = dict(state["latest"])
        self._losses, self._seconds = list(state["losses"]), state["loss_seconds"]
        self.metrics.rewind(self.training.step_count)
        self._remove_unfinished()

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Trains on, and yields after every step.

        Args:
            should_stop: Asked after every step; True: save and return.
        """
        training, every = self.training, self.intervals
        tokens = training.run.batch_size * training.run.seq_len
        while not training.done:
            result = training.step()
            values = self.values(result)
            loss, seconds = values.pop("loss"), values.pop("seconds")
            self._losses.append(loss)
            self._seconds += seconds
            step, last = training.step_count, training.done
            measured = None
            if last or step % every.validate_every == 0:
                measured = self.latest = self.measure()
            if measured is not None or step % every.log_every == 0:
                self._log(values | (measured or {}), tokens)
            yield Progress(result, per_second(tokens, seconds), measured)
            stop = should_stop()
            if stop or last or step % every.checkpoint_every == 0:
                self.save()
            if stop:
                return

    def save(self) -> Path:
        """Writes a checkpoint of this moment."""
        self.metrics.sync()
        settings = self.settings()
        state = {
            self.KEY: settings, MARK: make_mark(settings), "inputs": self.inputs(),
            "fingerprint": self.text.fingerprint(), "latest": self.latest,
            "losses": list(self._losses), "loss_seconds": self._seconds,
            "training": self.training.state_dict(),
        }  # fmt: skip
        return save_checkpoint(self.checkpoints, self.training.step_count, state)

    def _remove_unfinished(self) -> None:
        # Checkpoints, and what a command writes at its end: an adapter, low-rank changes, a model.
        for folder in (self.folder, *(x for x in self.folder.iterdir() if x.is_dir())):
            if not folder.is_symlink():
                remove_unfinished(folder)

    def _log(self, values: Mapping[str, Any], tokens: int) -> None:
        rate = per_second(len(self._losses) * tokens, self._seconds)
        self.metrics.append(
            {
                "step": self.training.step_count,
                "loss": sum(self._losses) / len(self._losses),
                "seconds": round(self.training.seconds, 3),
                "tokens_per_second": None if rate is None else round(rate, 1),
                **values,
            }
        )
        self._losses, self._seconds = [], 0.0


def per_second(count: float, seconds: float) -> float | None:
    """A rate; None where the clock stood still or went back."""
    return count / seconds if seconds > 0 else None


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What to read; see :func:`load_text`. ``paths=None``: the standard library's sources."""

    paths: tuple[str, ...] | None = None
    validation_share: float = 0.05
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        """Checks the types."""
        check_types(self)

    def load(self, seq_len: int) -> TextData:
        """Reads the text, which must hold sequences of this length."""
        return load_text(
            self.paths, validation_share=self.validation_share, max_bytes=self.max_bytes,
            seq_len=seq_len,
        )  # fmt: skip


class TrainingLoop(FolderLoop[LanguageModelTraining, TextData]):
    """A run in a folder; build it with :meth:`start` or :meth:`resume`.

    Beside those of :class:`FolderLoop` its metrics hold ``sparsity``, ``layer_sparsity`` (a list)
    and ``temperature``, and where it was measured ``validation_loss`` (nats per byte, like
    ``loss``), ``validation_bits_per_byte`` and ``validation_sparsity``.
    """

    KEY, COMMAND = "loop", "dilated-attention train"

    def __init__(
        self, folder: Path, run: LanguageModelRun, text_settings: TextSettings,
        intervals: LoopSettings,
    ) -> None:  # fmt: skip
        self.text_settings = text_settings
        text = text_settings.load(run.seq_len)
        super().__init__(folder, intervals, text, LanguageModelTraining(run, text))

    @classmethod
    def start(
        cls, folder: Path, run: LanguageModelRun, text_settings: TextSettings,
        intervals: LoopSettings,
    ) -> TrainingLoop:  # fmt: skip
        """A new run; writes the first line of metrics and the checkpoint of step 0.

        Raises:
            FileExistsError: If the folder already holds a run.
            TextError: If the text cannot be used.
        """
        cls.check_new(folder)
        loop = cls(folder, run, text_settings, intervals)
        loop.begin()
        return loop

    @classmethod
    def resume(
        cls,
        folder: Path,
        *,
        changes: Mapping[str, Any] | None = None,
        checkpoint_every: int | None = None,
    ) -> TrainingLoop:
        """Goes on from the newest checkpoint of a folder.

        Args:
            folder: Of the run.
            changes: Settings that the caller named; they must be those of the run.
            checkpoint_every: Replaces the interval (the result does not depend on it).

        Raises:
            CheckpointError: If there is no intact checkpoint, the text has changed, or the run is
                somebody else's and ``changes`` does not name the text that it would read.
            ValueError: If ``changes`` differ from the run's settings.
            TextError: If the text cannot be used any more.
        """
        state = cls.read_newest(folder)
        saved = state[cls.KEY]
        with checkpoint_settings(folder):
            run = LanguageModelRun.from_dict(saved["run"])
            text_settings = from_plain(TextSettings, saved["text"])
            intervals = from_plain(LoopSettings, saved["intervals"])
            settings = _flat_settings(saved)
        changes = changes or {}
        _check_same(settings, changes)
        unnamed = text_settings.paths is not None and "paths" not in changes
        check_named(folder, saved, state.get(MARK), ["text"] if unnamed else [])
        if checkpoint_every is not None:
            intervals = replace(intervals, checkpoint_every=checkpoint_every)
        check_model_state(run, state)
        loop = cls(folder, run, text_settings, intervals)
        loop.go_on(state)
        return loop

    def settings(self) -> dict[str, Any]:
        """Run, text and intervals."""
        return {
            "run": self.training.run.to_dict(),
            "text": to_plain(self.text_settings),
            "intervals": asdict(self.intervals),
        }

    def measure(self) -> dict[str, Any]:
        """The held-out loss, and the sparsity with which it was reached."""
        found = self.training.validate()
        return {
            "validation_loss": found.loss,
            "validation_bits_per_byte": found.bits_per_byte,
            "validation_sparsity": found.sparsity,
        }

    def values(self, result: StepResult) -> dict[str, Any]:
        """All that a step tells."""
        return {
            "loss": result.loss,
            "seconds": result.seconds,
            "sparsity": result.sparsity,
            "layer_sparsity": [round(x, 6) for x in result.layer_sparsity],
            "temperature": result.temperature,
        }


def check_model_state(run: LanguageModelRun, state: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the weights are those of the run's model.

    The model is not allocated for it: settings that somebody else wrote may be of any size.
    """
    with torch.device("meta"):
        model = build_language_model(replace(run, device="meta"))
    check_form("model", model.state_dict(), state["training"].get("model"))


def _flat_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a saved run in one dict, those of the attention beside the others.

    The scorer's ``num_layers`` is ``config.num_layers``; the plain name is the model's.
    """
    run = dict(saved["run"])
    config = run.pop("config")
    flat = {**config, "config.num_layers": config["num_layers"], **run}
    return {**flat, **saved["text"], **saved["intervals"]}


def _check_same(saved: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    differing = [
        f"{name} is {short_repr(saved[name], PLACE)} there and {short_repr(value, PLACE)} here"
        for name, value in to_plain(dict(changes)).items()
        if saved[name] != value
    ]
    if differing:
        raise ValueError(
            f"the run to resume has other settings: {'; '.join(differing)}. Leave these options "
            "out, or start a new run with another --out."
        )


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A finished or stopped run, read back from its folder.

    Attributes:
        folder: The folder.
        state: What the checkpoint holds.
        run: The settings.
        model: With the checkpoint's weights, on the CPU, in evaluation mode.
        text_settings: What it trained on.
        history: The lines of its metrics, up to the checkpoint.
        earlier: Checkpoints before this one, oldest first.
        note: Which lines of its metrics are left out, in words; None: all are there.
    """

    folder: Path
    state: Mapping[str, Any]
    run: LanguageModelRun
    model: Transformer
    text_settings: TextSettings
    history: list[dict[str, Any]]
    earlier: list[Path]
    note: str | None

    @property
    def step(self) -> int:
        """Optimiser steps of the checkpoint."""
        return int(self.state["step"])

    def held_out_windows(self, count: int, text: Path | None = None) -> Tensor:
        """Windows to look at, ``(up to count, seq_len + 1)`` int64.

        Args:
            count: How many at most, evenly spread.
            text: A file to cut them from. None: the run's own held-out text.

        Raises:
            TextError: If the text cannot be read, has changed, or is too short.
            CheckpointError: If the run is somebody else's and names files of its own.
        """
        seq_len, state = self.run.seq_len, self.state
        if text is not None:
            # All of a given file is shown; it was not trained on.
            return validation_windows(read_bytes(text, seq_len), seq_len, count)
        named = self.text_settings.paths is not None
        check_named(
            self.folder, state[TrainingLoop.KEY], state.get(MARK), ["text"] if named else []
        )
        own = self.text_settings.load(seq_len)
        if own.fingerprint() != state["fingerprint"]:
            raise TextError(
                f"the text of the run ({own.source}) has changed since; name one: --text FILE."
            )
        return validation_windows(own.validation, seq_len, count)


def load_saved_run(folder: Path, checkpoint: Path | None = None) -> SavedRun:
    """Reads a run.

    Args:
        folder: The ``--out`` of ``dilated-attention train``.
        checkpoint: Which one; None: the newest.

    Raises:
        CheckpointError: If there is no intact checkpoint, or another command wrote it.
    """
    path = newest_checkpoint(folder / CHECKPOINTS_NAME) if checkpoint is None else checkpoint
    state = load_checkpoint(path)
    if TrainingLoop.KEY not in state:
        raise CheckpointError(
            f"{path} is not a checkpoint of dilated-attention train. What distill and tune make is "
            "an adapter, which they write when they finish (--resume)."
        )
    check_loop_state(state, TrainingLoop.KEY, path)
    saved = state[TrainingLoop.KEY]
    with checkpoint_settings(folder):
        run = LanguageModelRun.from_dict({**saved["run"], "device": "cpu"})
        text_settings = from_plain(TextSettings, saved["text"])
    check_model_state(run, state)
    model = build_language_model(run)
    model.load_state_dict(state["training"]["model"])
    metrics = MetricsFile(folder / METRICS_NAME)
    history = [line for line in metrics.read() if line["step"] <= state["step"]]
    earlier = [p for p in list_checkpoints(path.parent) if p.name < path.name]
    return SavedRun(folder, state, run, model.eval(), text_settings, history, earlier, metrics.note)
