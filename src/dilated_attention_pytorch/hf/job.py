"""A fit or a tuning as a folder: started, resumed, and its adapter read back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dilated_attention_pytorch.config import check_types, from_plain
from dilated_attention_pytorch.foreign_text import PLACE, short_repr
from dilated_attention_pytorch.hf.adapt import AdaptedModel
from dilated_attention_pytorch.hf.adapter import SelectorAdapter
from dilated_attention_pytorch.hf.adapter_file import AdapterError, size_difference
from dilated_attention_pytorch.hf.calibration import Report
from dilated_attention_pytorch.hf.model_folder import (
    TokenText,
    check_vocabulary,
    load_lora,
    load_model,
    load_settings,
    load_tokenizer,
    load_tokens,
)
from dilated_attention_pytorch.hf.train_selectors import (
    LORA_NAME,
    MODEL_NAME,
    FitRun,
    Fitting,
    TuneRun,
    Tuning,
)
from dilated_attention_pytorch.tasks.text import TextError
from dilated_attention_pytorch.train.checkpoint import checkpoint_settings
from dilated_attention_pytorch.train.loop import METRICS_NAME, FolderLoop, LoopSettings
from dilated_attention_pytorch.train.run_folder import MARK, MetricsFile, check_named

# Files that decide what a model computes.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SIZES = ("config.json", "adapter.json", "adapter_config.json")


@dataclass(frozen=True, kw_only=True)
class PretrainedJob:
    """What to do with which model and text.

    Attributes:
        run: A :class:`FitRun` or a :class:`TuneRun`.
        model: Folder of the model.
        text: Files or folders of text.
        validation_share: Share of the bytes to hold out.
        max_bytes: Read as many bytes at most; None: all.
        intervals: How often to log, to measure and to save.
    """

    run: FitRun | TuneRun
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
            "kind": "tune" if isinstance(self.run, TuneRun) else "fit",
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
        kind = fields.pop("kind")
        if kind == "distill":
            raise ValueError(
                "it is a distillation, which fitting has replaced; fit anew with another --out. "
                "An adapter that it has written still works."
            )
        kinds: dict[str, type[FitRun | TuneRun]] = {"fit": FitRun, "tune": TuneRun}
        run = kinds[kind].from_dict(fields.pop("run"))
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

    def training(self, text: TokenText) -> Fitting | Tuning:
        """Loads and adapts the model.

        Raises:
            ValueError: If it cannot be loaded or adapted, or the tokens are another model's.
        """
        model = load_model(self.model, device=self.run.device)
        for part in (text.train, text.validation):
            check_vocabulary(model, part, text.source)
        if isinstance(self.run, TuneRun):
            return Tuning(self.run, model, text)
        return Fitting(self.run, model, text)


class PretrainedLoop(FolderLoop[Fitting | Tuning, TokenText]):
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
        """A new run; measures unless selectors are still to be fitted, and writes a checkpoint.

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
                there, here = short_repr(own.get(name), PLACE), short_repr(value, PLACE)
                raise ValueError(
                    f"the run to resume has other settings: {name} is {there} there and {here} "
                    "here. Leave it out, or start a new run with another --out."
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

    def save_result(self, report: Report | None = None) -> None:
        """Writes what was made: an adapter, and low-rank changes or a model with its tokenizer."""
        self.training.save(self.folder, report)
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


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """What the folder of an adapter holds, and what lies around it.

    Attributes:
        folder: Of the adapter.
        adapter: The selectors.
        base: Folder of the base model.
        lora: Folder of the low-rank changes that were tuned with them; None: there are none.
        history: Lines of the metrics of the run that wrote it; empty: not known.
        note: Which of these lines are left out, in words; None: all are there.
    """

    folder: Path
    adapter: SelectorAdapter
    base: str
    lora: Path | None
    history: list[dict[str, Any]]
    note: str | None = None

    @classmethod
    def open(cls, folder: Path, model: str | None = None) -> SavedAdapter:
        """Reads an adapter and finds its base.

        Args:
            folder: Of the adapter.
            model: Folder of the base model. None: the weights that were tuned with the adapter,
                or the folder that it was made from.

        Raises:
            AdapterError: If the adapter cannot be read, was not calibrated, or there is no base:
                where the adapter names it, the folder must hold a model of the same sizes.
            ValueError: If the settings of the base that it names cannot be read.
        """
        adapter = SelectorAdapter.read(folder)
        for number, table in adapter.thresholds().items():
            if table is None:
                raise AdapterError(
                    f"layer {number} of the adapter in {folder} has no thresholds: call "
                    "dilated_attention_pytorch.hf.calibrate before save_adapter."
                )
        around = folder.resolve().parent
        metrics = MetricsFile(around / METRICS_NAME)
        return cls(
            folder,
            adapter,
            _find_base(folder, adapter) if model is None else model,
            around / LORA_NAME if (around / LORA_NAME).is_dir() else None,
            metrics.read(),
            metrics.note,
        )

    def load(self, device: str = "cpu") -> AdaptedModel:
        """The base model with the adapter, its weights frozen, in evaluation mode.

        Raises:
            AdapterError: If the base is another one.
            ValueError: If it cannot be loaded or adapted.
        """
        model = load_model(self.base, device=device)
        if self.lora is not None:
            load_lora(model, self.lora)
        return self.adapter.apply(model).freeze_base()

    def tokenizer(self) -> Any:
        """The tokenizer of the base model.

        Raises:
            ValueError: If there is none.
        """
        return load_tokenizer(self.base)

    def held_out(self) -> Tensor:
        """The tokens that the run which wrote the adapter has held out, int32.

        Raises:
            CheckpointError: If no run of this account lies around the adapter.
            TextError: If its text cannot be read any more, or has changed.
            ValueError: If the model of the run has no tokenizer.
        """
        run = self.folder.resolve().parent
        state = PretrainedLoop.read_newest(run)
        # The text of somebody else's run is not read.
        check_named(run, state[PretrainedLoop.KEY], state.get(MARK), ["text"])
        with checkpoint_settings(run):
            job = PretrainedJob.from_dict(state[PretrainedLoop.KEY])
        text = job.tokens()
        if text.fingerprint() != state["fingerprint"]:
            raise TextError(
                f"the text of the run ({text.source}) has changed since; name one: --text FILE."
            )
        return text.validation

    @property
    def seq_len(self) -> int | None:
        """The longest window that thresholds were calibrated at; None: there are none."""
        tables = self.adapter.thresholds().values()
        return max((table.lengths[-1] for table in tables if table is not None), default=None)


def _find_base(folder: Path, adapter: SelectorAdapter) -> str:
    tuned = folder.resolve().parent / MODEL_NAME
    if tuned.is_dir():
        return str(tuned)
    name = adapter.base.get("name") or ""
    if name and Path(name).is_dir():
        # Whoever wrote the adapter has chosen that folder: nothing but its settings is read before
        # it is known to fit.
        found = size_difference(adapter.base, load_settings(name))
        if found is None:
            return str(name)
        raise AdapterError(
            f"the adapter in {folder} was made for {short_repr(name, PLACE)}, where another model "
            f"is now: {found}. Give the base model's folder (--model)."
        )
    known = "does not name its base"
    if name:
        known = f"was made for {short_repr(name, PLACE)}, which is no folder here"
    raise AdapterError(f"the adapter in {folder} {known}; give the base model's folder (--model).")
