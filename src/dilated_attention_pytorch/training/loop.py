"""Runs a language model's training in a folder: metrics, checkpoints, stopping and going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.tasks.text import TextData, load_text
from dilated_attention_pytorch.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from dilated_attention_pytorch.training.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
    StepResult,
    ValidationResult,
)
from dilated_attention_pytorch.training.metrics import MetricsFile

METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What to read; see :func:`load_text`. ``paths=None``: the standard library's sources."""

    paths: tuple[str, ...] | None = None
    validation_share: float = 0.05
    max_bytes: int | None = None

    def load(self, seq_len: int) -> TextData:
        """Reads the text."""
        return load_text(
            self.paths,
            validation_share=self.validation_share,
            max_bytes=self.max_bytes,
            seq_len=seq_len,
        )


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
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class Progress:
    """What happened in a step.

    Attributes:
        result: Of the step.
        tokens_per_second: Of the step.
        validation: If it was measured now.
    """

    result: StepResult
    tokens_per_second: float
    validation: ValidationResult | None


class TrainingLoop:
    """A run in a folder; build it with :meth:`start` or :meth:`resume`.

    Attributes:
        training: Model and optimiser.
        text: What it trains on.
        metrics: One line per ``log_every`` steps: ``step``, ``loss`` (mean of the steps since the
            line before, nats per byte), ``sparsity``, ``layer_sparsity`` (a list), ``temperature``,
            ``seconds``, ``tokens_per_second``, and where it was measured ``validation_loss`` (nats
            per byte), ``validation_bits_per_byte``, ``validation_sparsity``.
    """

    def __init__(
        self,
        folder: Path,
        run: LanguageModelRun,
        text_settings: TextSettings,
        settings: LoopSettings,
    ) -> None:
        self.folder, self.settings, self.text_settings = folder, settings, text_settings
        self.text = text_settings.load(run.seq_len)
        self.training = LanguageModelTraining(run, self.text)
        self.metrics = MetricsFile(folder / METRICS_NAME)
        self.latest_validation: ValidationResult | None = None
        # Losses and seconds since the last line of metrics.
        self._losses: list[float] = []
        self._seconds = 0.0

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.folder / CHECKPOINTS_NAME

    @classmethod
    def start(
        cls,
        folder: Path,
        run: LanguageModelRun,
        text_settings: TextSettings,
        settings: LoopSettings,
    ) -> TrainingLoop:
        """A new run; writes the first line of metrics and the checkpoint of step 0.

        Raises:
            FileExistsError: If the folder already holds a run.
            TextError: If the text cannot be used.
        """
        if list_checkpoints(folder / CHECKPOINTS_NAME):
            raise FileExistsError(
                f"{folder} already holds a run. Add --resume to go on with it, or choose another "
                "--out."
            )
        loop = cls(folder, run, text_settings, settings)
        folder.mkdir(parents=True, exist_ok=True)
        loop.metrics.start()
        loop.latest_validation = loop.training.validate()
        loop.metrics.append({"step": 0, **_validation_values(loop.latest_validation)})
        loop.save()
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
            CheckpointError: If there is no intact checkpoint, or the text has changed.
            ValueError: If ``changes`` differ from the run's settings.
            TextError: If the text cannot be used any more.
        """
        path = newest_checkpoint(folder / CHECKPOINTS_NAME)
        state = load_checkpoint(path)
        saved = state["loop"]
        _check_same(flat_settings(saved), changes or {})
        text = dict(saved["text"])
        text["paths"] = None if text["paths"] is None else tuple(text["paths"])
        intervals = dict(saved["intervals"])
        if checkpoint_every is not None:
            intervals["checkpoint_every"] = checkpoint_every
        loop = cls(
            folder,
            LanguageModelRun.from_dict(saved["run"]),
            TextSettings(**text),
            LoopSettings(**intervals),
        )
        if loop.text.fingerprint() != saved["fingerprint"]:
            raise CheckpointError(
                f"the text ({loop.text.source}) has changed since {path} was written; going on "
                "would not give the same result. Restore it, or start a new run with another "
                "--out."
            )
        loop.training.load_state_dict(state["training"])
        loop._losses, loop._seconds = list(saved["losses"]), saved["seconds"]
        loop.metrics.rewind(loop.training.step_count)
        remove_unfinished(loop.checkpoints)
        return loop

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Trains on, and yields after every step.

        Args:
            should_stop: Asked after every step; True: save and return.
        """
        training, settings = self.training, self.settings
        while not training.done:
            result = training.step()
            self._losses.append(result.loss)
            self._seconds += result.seconds
            step, last = result.step, training.done
            validation = None
            if last or step % settings.validate_every == 0:
                validation = self.latest_validation = training.validate()
            if last or step % settings.log_every == 0 or validation is not None:
                self._log(result, validation)
            tokens = training.run.batch_size * training.run.seq_len
            yield Progress(result, tokens / result.seconds, validation)
            stop = should_stop()
            if stop or last or step % settings.checkpoint_every == 0:
                self.save()
            if stop:
                return

    def save(self) -> Path:
        """Writes a checkpoint of this moment."""
        self.metrics.sync()
        training = self.training
        loop = {
            "run": training.run.to_dict(),
            "text": _plain(asdict(self.text_settings)),
            "intervals": asdict(self.settings),
            "fingerprint": self.text.fingerprint(),
            "losses": list(self._losses),
            "seconds": self._seconds,
        }
        state = {"loop": loop, "training": training.state_dict()}
        return save_checkpoint(self.checkpoints, training.step_count, state)

    def _log(self, result: StepResult, validation: ValidationResult | None) -> None:
        run = self.training.run
        tokens = len(self._losses) * run.batch_size * run.seq_len
        line: dict[str, Any] = {
            "step": result.step,
            "loss": sum(self._losses) / len(self._losses),
            "sparsity": result.sparsity,
            "layer_sparsity": [round(x, 6) for x in result.layer_sparsity],
            "temperature": result.temperature,
            "seconds": round(self.training.seconds, 3),
            "tokens_per_second": round(tokens / self._seconds, 1),
        }
        if validation is not None:
            line |= _validation_values(validation)
        self.metrics.append(line)
        self._losses, self._seconds = [], 0.0


def flat_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a saved run in one dict, those of the attention beside the others.

    The scorer's ``num_layers`` is ``config.num_layers``; the plain name is the model's.
    """
    run = dict(saved["run"])
    config = run.pop("config")
    flat = {**config, "config.num_layers": config["num_layers"], **run}
    return {**flat, **saved["text"], **saved["intervals"]}


def _check_same(saved: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    differing = [
        f"{name} is {saved[name]!r} there and {_plain(value)!r} here"
        for name, value in changes.items()
        if saved[name] != _plain(value)
    ]
    if differing:
        raise ValueError(
            f"the run to resume has other settings: {'; '.join(differing)}. Leave these options "
            "out, or start a new run with another --out."
        )


def _plain(value: Any) -> Any:
    """Tuples as lists, as a checkpoint holds them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _validation_values(validation: ValidationResult) -> dict[str, Any]:
    return {
        "validation_loss": validation.loss,
        "validation_bits_per_byte": validation.bits_per_byte,
        "validation_sparsity": validation.sparsity,
    }
