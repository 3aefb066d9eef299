"""A training in a folder: metrics, checkpoints, stopping at any moment and going on exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from dilated_attention_pytorch.config import check_types
from dilated_attention_pytorch.training.checked_state import check_loop_state
from dilated_attention_pytorch.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from dilated_attention_pytorch.training.metrics import MetricsFile
from dilated_attention_pytorch.training.own_mark import MARK, make_mark

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


class Text(Protocol):
    """What is trained on."""

    @property
    def source(self) -> str:
        """Where it comes from, in words."""

    def fingerprint(self) -> str:
        """Changes with every byte."""


class Training(Protocol):
    """What is trained: model, optimiser and all else that :meth:`state_dict` holds."""

    step_count: int
    seconds: float

    @property
    def run(self) -> Any:
        """Settings; ``batch_size`` and ``seq_len`` among them."""

    @property
    def done(self) -> bool:
        """Whether all steps are done."""

    def step(self) -> Any:
        """Does one optimiser step."""

    def state_dict(self) -> dict[str, Any]:
        """All of the state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`'s result."""


Model = TypeVar("Model", bound=Training)
Data = TypeVar("Data", bound=Text)


@dataclass(frozen=True)
class Progress:
    """What happened in a step.

    Attributes:
        result: What the training's ``step`` returned.
        tokens_per_second: Of the step; None where the clock stood still.
        measured: On the held-out text, as in the metrics, if it was measured now.
        remark: A line for people; empty unless something is to be said.
    """

    result: Any
    tokens_per_second: float | None
    measured: dict[str, Any] | None
    remark: str = ""


class FolderLoop(ABC, Generic[Model, Data]):
    """Trains in a folder; subclasses say what, and add ways to start and to go on.

    One at a time may write into a folder: the commands hold it with :func:`lock_folder`, and so
    should a program of one's own.

    Args:
        folder: Where metrics and checkpoints go.
        intervals: How often to log, to measure and to save.
        text: What is trained on.
        training: Model and optimiser.

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

    def remark(self) -> str:
        """What is to be said of the training after this step; mostly nothing."""
        return ""

    def inputs(self) -> dict[str, str]:
        """A digest of everything that is read beside the text, by what it is."""
        return {}

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
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
            yield Progress(result, per_second(tokens, seconds), measured, self.remark())
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
            self.KEY: settings,
            MARK: make_mark(settings),
            "inputs": self.inputs(),
            "fingerprint": self.text.fingerprint(),
            "latest": self.latest,
            "losses": list(self._losses),
            "loss_seconds": self._seconds,
            "training": self.training.state_dict(),
        }
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
