"""A distillation or tuning as a folder: metrics, checkpoints, stopping, going on, results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.integrations.transformers.distill import Distillation, DistillRun
from dilated_attention_pytorch.integrations.transformers.pretrained_training import (
    PretrainedTraining,
)
from dilated_attention_pytorch.integrations.transformers.tokens import (
    TokenText,
    load_model,
    load_tokenizer,
    load_tokens,
)
from dilated_attention_pytorch.integrations.transformers.tune import TuneRun, Tuning
from dilated_attention_pytorch.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from dilated_attention_pytorch.training.loop import CHECKPOINTS_NAME, METRICS_NAME, LoopSettings
from dilated_attention_pytorch.training.metrics import MetricsFile


@dataclass(frozen=True, kw_only=True)
class PretrainedJob:
    """What to do with which model and text.

    Attributes:
        run: A :class:`DistillRun` or a :class:`TuneRun`.
        model: Folder of the model.
        text: Files or folders of text.
        validation_share: Share of the bytes to hold out.
        max_bytes: Read as many bytes at most; None: all.
        intervals: How often to log, to measure and to save.
    """

    run: DistillRun | TuneRun
    model: str
    text: tuple[str, ...]
    validation_share: float = 0.05
    max_bytes: int | None = None
    intervals: LoopSettings = field(default_factory=LoopSettings)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {
            "kind": "distill" if isinstance(self.run, DistillRun) else "tune",
            "run": self.run.to_dict(),
            "model": self.model,
            "text": list(self.text),
            "validation_share": self.validation_share,
            "max_bytes": self.max_bytes,
            "intervals": asdict(self.intervals),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainedJob:
        """Builds a job from :meth:`to_dict`'s result."""
        fields = dict(values)
        kind: type[DistillRun | TuneRun] = (
            DistillRun if fields.pop("kind") == "distill" else TuneRun
        )
        run = kind.from_dict(fields.pop("run"))
        intervals = LoopSettings(**fields.pop("intervals"))
        return cls(**{**fields, "text": tuple(fields["text"])}, run=run, intervals=intervals)

    def tokens(self) -> TokenText:
        """Reads and tokenizes the text.

        Raises:
            TextError: If it cannot be read, or is too short.
            ValueError: If the model has no tokenizer.
        """
        return load_tokens(
            load_tokenizer(self.model), self.text, seq_len=self.run.seq_len,
            validation_share=self.validation_share, max_bytes=self.max_bytes,
        )  # fmt: skip

    def training(self, text: TokenText) -> Distillation | Tuning:
        """Loads and adapts the model.

        Raises:
            ValueError: If it cannot be loaded or adapted.
        """
        model = load_model(self.model, device=self.run.device)
        if isinstance(self.run, DistillRun):
            return Distillation(self.run, model, text)
        return Tuning(self.run, model, text)


class PretrainedLoop:
    """A job in a folder; build it with :meth:`start` or :meth:`resume`.

    Attributes:
        job: What is done.
        training: Model and optimiser.
        metrics: Lines with ``step``, ``loss`` (mean since the line before), ``seconds``,
            ``tokens_per_second``, and where it was measured what ``training.validate()`` gives.
        latest: The latest such measurement.
    """

    def __init__(self, folder: Path, job: PretrainedJob) -> None:
        self.folder, self.job = folder, job
        self.text = job.tokens()
        self.training: Distillation | Tuning = job.training(self.text)
        self.metrics = MetricsFile(folder / METRICS_NAME)
        self.latest: dict[str, float] = {}
        self._losses: list[float] = []
        self._seconds = 0.0

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.folder / CHECKPOINTS_NAME

    @classmethod
    def start(cls, folder: Path, job: PretrainedJob) -> PretrainedLoop:
        """A new run; measures, and writes the checkpoint of step 0.

        Raises:
            FileExistsError: If the folder already holds a run.
        """
        if list_checkpoints(folder / CHECKPOINTS_NAME):
            raise FileExistsError(
                f"{folder} already holds a run. Add --resume to go on with it, or choose another "
                "--out."
            )
        loop = cls(folder, job)
        folder.mkdir(parents=True, exist_ok=True)
        loop.metrics.start()
        loop.latest = loop.training.validate()
        loop.metrics.append({"step": 0, **loop.latest})
        loop.save()
        return loop

    @classmethod
    def resume(cls, folder: Path) -> PretrainedLoop:
        """Goes on from the newest checkpoint of a folder, with its settings.

        Raises:
            CheckpointError: If there is no intact checkpoint, or the text has changed.
        """
        path = newest_checkpoint(folder / CHECKPOINTS_NAME)
        state = load_checkpoint(path)
        if "job" not in state:
            raise CheckpointError(f"{path} is not a checkpoint of distill or tune.")
        loop = cls(folder, PretrainedJob.from_dict(state["job"]))
        if loop.text.fingerprint() != state["fingerprint"]:
            raise CheckpointError(
                f"the text ({loop.text.source}) has changed since {path} was written; going on "
                "would not give the same result. Restore it, or start a new run with another "
                "--out."
            )
        loop.training.load_state_dict(state["training"])
        loop.latest = dict(state["latest"])
        loop._losses, loop._seconds = list(state["losses"]), state["loss_seconds"]
        loop.metrics.rewind(loop.training.step_count)
        remove_unfinished(loop.checkpoints)
        return loop

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[dict[str, float]]:
        """Trains on, and yields after every step: ``loss``, ``seconds``, ``tokens_per_second``.

        Args:
            should_stop: Asked after every step; True: save and return.
        """
        training, every = self.training, self.job.intervals
        while not training.done:
            result = training.step()
            self._losses.append(result["loss"])
            self._seconds += result["seconds"]
            step, last = training.step_count, training.done
            measured = last or step % every.validate_every == 0
            if measured:
                self.latest = training.validate()
            if measured or step % every.log_every == 0:
                self._log(self.latest if measured else {})
            tokens = training.run.batch_size * training.run.seq_len
            yield {**result, "tokens_per_second": tokens / result["seconds"]}
            stop = should_stop()
            if stop or last or step % every.checkpoint_every == 0:
                self.save()
            if stop:
                return

    def save(self) -> Path:
        """Writes a checkpoint of this moment."""
        self.metrics.sync()
        state = {
            "job": self.job.to_dict(),
            "fingerprint": self.text.fingerprint(),
            "latest": self.latest,
            "losses": list(self._losses),
            "loss_seconds": self._seconds,
            "training": self.training.state_dict(),
        }
        return save_checkpoint(self.checkpoints, self.training.step_count, state)

    def _log(self, measured: Mapping[str, float]) -> None:
        training: PretrainedTraining = self.training
        tokens = len(self._losses) * training.run.batch_size * training.run.seq_len
        self.metrics.append(
            {
                "step": training.step_count,
                "loss": sum(self._losses) / len(self._losses),
                "seconds": round(training.seconds, 3),
                "tokens_per_second": round(tokens / self._seconds, 1),
                **measured,
            }
        )
        self._losses, self._seconds = [], 0.0
