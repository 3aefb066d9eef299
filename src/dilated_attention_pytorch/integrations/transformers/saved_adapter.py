"""An adapter read back from its folder, with the base model and the run that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel
from dilated_attention_pytorch.integrations.transformers.adapter import SelectorAdapter
from dilated_attention_pytorch.integrations.transformers.adapter_file import AdapterError
from dilated_attention_pytorch.integrations.transformers.base_identity import size_difference
from dilated_attention_pytorch.integrations.transformers.job import PretrainedJob, PretrainedLoop
from dilated_attention_pytorch.integrations.transformers.lora import load_lora
from dilated_attention_pytorch.integrations.transformers.tokens import (
    load_model,
    load_settings,
    load_tokenizer,
)
from dilated_attention_pytorch.integrations.transformers.tune import LORA_NAME, MODEL_NAME
from dilated_attention_pytorch.selection.threshold import ThresholdTable
from dilated_attention_pytorch.tasks.text import TextError
from dilated_attention_pytorch.train.checkpoint import checkpoint_settings
from dilated_attention_pytorch.train.loop import METRICS_NAME
from dilated_attention_pytorch.train.run_folder import MARK, MetricsFile, check_named


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
        for number, config in adapter.configs.items():
            if config.budget != "threshold":
                continue
            rows = adapter.tensors.get(f"{number}.thresholds")
            if rows is None or ThresholdTable.from_buffer(rows) is None:
                raise AdapterError(
                    f"layer {number} of the adapter in {folder} has no thresholds: call "
                    "integrations.transformers.calibrate.calibrate before save_adapter."
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
        tables = [
            ThresholdTable.from_buffer(rows)
            for name, rows in self.adapter.tensors.items()
            if name.endswith(".thresholds")
        ]
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
            f"the adapter in {folder} was made for {name!r}, where another model is now: {found}. "
            "Give the base model's folder (--model)."
        )
    known = f"was made for {name!r}, which is no folder here" if name else "does not name its base"
    raise AdapterError(f"the adapter in {folder} {known}; give the base model's folder (--model).")
