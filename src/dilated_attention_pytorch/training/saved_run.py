"""A finished or stopped training run, read back from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dilated_attention_pytorch.models.transformer import Transformer
from dilated_attention_pytorch.tasks.text import TextError, read_bytes, validation_windows
from dilated_attention_pytorch.training.checked_state import (
    check_loop_state,
    checkpoint_settings,
)
from dilated_attention_pytorch.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
)
from dilated_attention_pytorch.training.folder_loop import CHECKPOINTS_NAME, METRICS_NAME
from dilated_attention_pytorch.training.language_model import (
    LanguageModelRun,
    build_language_model,
)
from dilated_attention_pytorch.training.loop import (
    TextSettings,
    TrainingLoop,
    check_model_state,
)
from dilated_attention_pytorch.training.metrics import MetricsFile
from dilated_attention_pytorch.training.own_mark import MARK, check_named


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What a run's folder holds.

    Attributes:
        folder: The folder.
        step: Optimiser steps of the checkpoint.
        run: The settings.
        model: With the checkpoint's weights, on the CPU, in evaluation mode.
        text_settings: What it trained on.
        fingerprint: Of the text that it trained on.
        settings: As the checkpoint holds them.
        mark: Whose run it is.
        history: The lines of its metrics, up to the checkpoint.
        earlier: Checkpoints before this one, oldest first.
        note: Which lines of its metrics are left out, in words; None: all are there.
    """

    folder: Path
    step: int
    run: LanguageModelRun
    model: Transformer
    text_settings: TextSettings
    fingerprint: object
    settings: Mapping[str, Any]
    mark: object
    history: list[dict[str, Any]]
    earlier: list[Path]
    note: str | None

    def held_out_windows(self, count: int, text: Path | None = None) -> Tensor:
        """Windows to look at, ``(up to count, seq_len + 1)`` int64.

        Args:
            count: How many at most, evenly spread.
            text: A file to cut them from. None: the run's own held-out text.

        Raises:
            TextError: If the text cannot be read, has changed, or is too short.
            CheckpointError: If the run is somebody else's and names files of its own.
        """
        seq_len = self.run.seq_len
        if text is None:
            named = self.text_settings.paths is not None
            check_named(self.folder, self.settings, self.mark, ["text"] if named else [])
            own = self.text_settings.load(seq_len)
            if own.fingerprint() != self.fingerprint:
                raise TextError(
                    f"the text of the run ({own.source}) has changed since; name one: --text FILE."
                )
            data = own.validation
        else:
            # All of a given file is shown; it was not trained on.
            data = read_bytes(text, seq_len)
        return validation_windows(data, seq_len, count)


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
        text_settings = TextSettings.from_dict(saved["text"])
    check_model_state(run, state)
    model = build_language_model(run)
    model.load_state_dict(state["training"]["model"])
    metrics = MetricsFile(folder / METRICS_NAME)
    lines = metrics.read()
    return SavedRun(
        folder,
        state["step"],
        run,
        model.eval(),
        text_settings,
        state["fingerprint"],
        saved,
        state.get(MARK),
        [line for line in lines if line["step"] <= state["step"]],
        [p for p in list_checkpoints(path.parent) if p.name < path.name],
        metrics.note,
    )
