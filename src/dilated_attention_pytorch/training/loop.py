"""A language model's training in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.config import check_types, from_plain
from dilated_attention_pytorch.nn.held_budget import LEAVE_PLATEAU, PEAKED
from dilated_attention_pytorch.tasks.text import TextData, load_text
from dilated_attention_pytorch.training.checked_state import check_shapes, checkpoint_settings
from dilated_attention_pytorch.training.folder_loop import FolderLoop, LoopSettings
from dilated_attention_pytorch.training.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
    StepResult,
    build_language_model,
)
from dilated_attention_pytorch.training.own_mark import MARK, check_named


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
        """Reads the text."""
        return load_text(
            self.paths,
            validation_share=self.validation_share,
            max_bytes=self.max_bytes,
            seq_len=seq_len,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextSettings:
        """Builds settings from what a checkpoint holds of them."""
        return from_plain(cls, values)


class TrainingLoop(FolderLoop[LanguageModelTraining, TextData]):
    """A run in a folder; build it with :meth:`start` or :meth:`resume`.

    Beside those of :class:`FolderLoop` its metrics hold ``sparsity``, ``layer_sparsity`` (a list)
    and ``temperature``, and where it was measured ``validation_loss`` (nats per byte, like
    ``loss``), ``validation_bits_per_byte`` and ``validation_sparsity``.
    """

    KEY, COMMAND = "loop", "dilated-attention train"

    def __init__(
        self,
        folder: Path,
        run: LanguageModelRun,
        text_settings: TextSettings,
        intervals: LoopSettings,
    ) -> None:
        self.text_settings = text_settings
        text = text_settings.load(run.seq_len)
        super().__init__(folder, intervals, text, LanguageModelTraining(run, text))

    @classmethod
    def start(
        cls,
        folder: Path,
        run: LanguageModelRun,
        text_settings: TextSettings,
        intervals: LoopSettings,
    ) -> TrainingLoop:
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
            text_settings = TextSettings.from_dict(saved["text"])
            intervals = from_plain(LoopSettings, saved["intervals"])
            settings = flat_settings(saved)
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
            "text": _plain(asdict(self.text_settings)),
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

    def remark(self) -> str:
        """Says once, where the longest dense start ends, that nothing was found to look at."""
        trainer = self.training.trainer
        if trainer is None or trainer.current_step != trainer.annealing_steps:
            return ""
        peak = trainer.highest_peak()
        # 0: no row has had three blocks to compare.
        if peak is None or not 0 < peak < PEAKED:
            return ""
        return (
            "the plateau: no layer's attention says yet where to read (its target is "
            f"{peak:.2f} of the way from uniform to one block; {PEAKED:g} would be clear). "
            f"{LEAVE_PLATEAU}"
        )


def check_model_state(run: LanguageModelRun, state: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the weights are those of the run's model.

    The model is not allocated for it: settings that somebody else wrote may be of any size.
    """
    with torch.device("meta"):
        model = build_language_model(replace(run, device="meta"))
    check_shapes(model.state_dict(), state["training"].get("model"), "model")


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
