"""A distillation or tuning as a folder: metrics, checkpoints, stopping, going on, results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.config import check_types, from_plain
from dilated_attention_pytorch.integrations.transformers.distill import Distillation, DistillRun
from dilated_attention_pytorch.integrations.transformers.tokens import (
    TokenText,
    check_vocabulary,
    load_model,
    load_tokenizer,
    load_tokens,
)
from dilated_attention_pytorch.integrations.transformers.tune import MODEL_NAME, TuneRun, Tuning
from dilated_attention_pytorch.train.checkpoint import checkpoint_settings
from dilated_attention_pytorch.train.loop import FolderLoop, LoopSettings
from dilated_attention_pytorch.train.run_folder import MARK, check_named

# Files that decide what a model computes.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SIZES = ("config.json", "adapter.json", "adapter_config.json")


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

    def __post_init__(self) -> None:
        """Checks the types."""
        check_types(self)

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
        """Builds a job from :meth:`to_dict`'s result.

        Raises:
            KeyError, TypeError or ValueError: If anything is missing, or of the wrong type.
        """
        fields = dict(values)
        kinds: dict[str, type[DistillRun | TuneRun]] = {"distill": DistillRun, "tune": TuneRun}
        run = kinds[fields.pop("kind")].from_dict(fields.pop("run"))
        intervals = from_plain(LoopSettings, fields.pop("intervals"))
        return from_plain(cls, fields, run=run, intervals=intervals)

    def folders(self) -> dict[str, str]:
        """The folders that it reads, by the option that names them."""
        found = {"model": self.model, "adapter": getattr(self.run, "adapter", None)}
        return {name: folder for name, folder in found.items() if folder is not None}

    def named_files(self) -> dict[str, Any]:
        """All that it reads, by the option that names it."""
        return {**self.folders(), "text": list(self.text)}

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
            ValueError: If it cannot be loaded or adapted, or the tokens are another model's.
        """
        model = load_model(self.model, device=self.run.device)
        for part in (text.train, text.validation):
            check_vocabulary(model, part, text.source)
        if isinstance(self.run, DistillRun):
            return Distillation(self.run, model, text)
        return Tuning(self.run, model, text)


class PretrainedLoop(FolderLoop[Distillation | Tuning, TokenText]):
    """A job in a folder; build it with :meth:`start` or :meth:`resume`.

    Attributes:
        job: What is done.
    """

    KEY, COMMAND = "job", "dilated-attention distill or tune"

    def __init__(self, folder: Path, job: PretrainedJob) -> None:
        self.job = job
        self._inputs = {name: folder_digest(place) for name, place in job.folders().items()}
        text = job.tokens()
        super().__init__(folder, job.intervals, text, job.training(text))

    @classmethod
    def start(cls, folder: Path, job: PretrainedJob) -> PretrainedLoop:
        """A new run; measures, and writes the checkpoint of step 0.

        Raises:
            FileExistsError: If the folder already holds a run.
        """
        cls.check_new(folder)
        loop = cls(folder, job)
        loop.begin()
        return loop

    @classmethod
    def resume(cls, folder: Path, named: Mapping[str, Any] | None = None) -> PretrainedLoop:
        """Goes on from the newest checkpoint of a folder, with its settings.

        Args:
            folder: Of the run.
            named: Files that the caller names: ``model``, ``text``, ``adapter``; they must be
                those of the run. A run that somebody else made must be given all of its own.

        Raises:
            CheckpointError: If there is no intact checkpoint, the text or a model has changed, or
                the run is somebody else's and a file that it would read is not named.
            ValueError: If ``named`` differs from the run's settings.
        """
        state = cls.read_newest(folder)
        with checkpoint_settings(folder):
            job = PretrainedJob.from_dict(state[cls.KEY])
        given, own = dict(named or {}), job.named_files()
        for name, value in given.items():
            value = list(value) if name == "text" else value
            if own.get(name) != value:
                raise ValueError(
                    f"the run to resume has other settings: {name} is {own.get(name)!r} there and "
                    f"{value!r} here. Leave it out, or start a new run with another --out."
                )
        check_named(folder, state[cls.KEY], state.get(MARK), [x for x in own if x not in given])
        loop = cls(folder, job)
        loop.go_on(state)
        return loop

    def settings(self) -> dict[str, Any]:
        """The job."""
        return self.job.to_dict()

    def inputs(self) -> dict[str, str]:
        """Of the model, and of the adapter if there is one."""
        return self._inputs

    def measure(self) -> dict[str, Any]:
        """What the training validates."""
        return self.training.validate()

    def values(self, result: Mapping[str, float]) -> dict[str, Any]:
        """Loss and seconds."""
        return dict(result)

    def save_result(self) -> None:
        """Writes what was made: an adapter, and low-rank changes or a model with its tokenizer."""
        self.training.save(self.folder)
        if (self.folder / MODEL_NAME).is_dir():
            load_tokenizer(self.job.model).save_pretrained(self.folder / MODEL_NAME)


def folder_digest(folder: str | Path) -> str:
    """SHA-256 of a model's or an adapter's sizes and weights: another model gives another one.

    Raises:
        ValueError: If there is no such folder, or a file of it cannot be read.
    """
    place, digest = Path(folder), hashlib.sha256()
    if not place.is_dir():
        raise ValueError(f"there is no folder {folder}.")
    for path in sorted(place.iterdir()):
        if (path.suffix not in _WEIGHTS and path.name not in _SIZES) or not path.is_file():
            continue
        digest.update(path.name.encode("utf-8", "surrogateescape") + b"\0")
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    return digest.hexdigest()
