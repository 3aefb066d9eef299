"""What ``report`` and ``diagnose`` look at: a run's model on some windows of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dilated_attention_pytorch.analysis import (
    Diagnosis,
    Recording,
    diagnose,
    pattern_stability,
    record,
)
from dilated_attention_pytorch.analysis.recording import byte_tokens
from dilated_attention_pytorch.analysis.report import Chart
from dilated_attention_pytorch.cli.errors import CommandError
from dilated_attention_pytorch.tasks.text import TextError
from dilated_attention_pytorch.training.checkpoint import CheckpointError
from dilated_attention_pytorch.training.language_model import next_byte_loss
from dilated_attention_pytorch.training.saved_run import SavedRun, load_saved_run


@dataclass(frozen=True, eq=False)
class Examined:
    """A run and the windows to look at, ``(samples, seq_len + 1)`` int64."""

    saved: SavedRun
    windows: Tensor

    @classmethod
    def open(cls, folder: Path, text: Path | None, samples: int) -> Examined:
        """Reads a run and its windows.

        Raises:
            CommandError: If either cannot be read, or the run's attention is dense.
        """
        try:
            saved = load_saved_run(folder)
            if saved.run.attention == "dense":
                raise CommandError(f"{folder} is a run with dense attention: no block is chosen.")
            return cls(saved, saved.held_out_windows(samples, text))
        except (CheckpointError, TextError) as error:
            raise CommandError(str(error)) from error

    def diagnose(self) -> Diagnosis | None:
        """None: the run has a fixed pattern, and nothing that could fail to learn."""
        if self.saved.run.attention != "adaptive":
            return None
        return diagnose(
            self.saved.model,
            self.windows,
            loss_function=next_byte_loss,
            history=self.saved.history,
        )

    def record(self) -> Recording:
        """What the newest checkpoint reads in the windows."""
        run, name = self.saved.run, self.saved.folder
        return _record(
            self.saved.model, self.windows, f"{run.attention} attention, step {self.saved.step} of "
            f"{run.steps}, {name}",
        )  # fmt: skip

    def stability(self, now: Recording) -> Sequence[Sequence[float]] | None:
        """How much of the patterns stayed since the checkpoint before; None: there is none."""
        if not self.saved.earlier:
            return None
        before = load_saved_run(self.saved.folder, self.saved.earlier[-1])
        return pattern_stability(_record(before.model, self.windows, ""), now)


def _record(model: nn.Module, windows: Tensor, source: str) -> Recording:
    texts = [byte_tokens(bytes(window[:-1].tolist())) for window in windows]
    return record(
        model,
        [window[None, :-1] for window in windows],
        texts=texts,
        max_samples=len(windows),
        source=source,
    )


def training_charts(history: Sequence[dict[str, Any]]) -> list[Chart]:
    """Charts of a run's metrics; what was not logged is left out."""
    charts = []
    for title, fields in (
        ("Loss on training batches, nats per byte", {"loss": "loss"}),
        ("Held-out loss, nats per byte", {"validation_loss": "held-out loss"}),
        ("Temperature", {"temperature": "temperature"}),
    ):
        series = {
            name: [(line["step"], line[field]) for line in history if line.get(field) is not None]
            for field, name in fields.items()
        }
        if all(len(points) > 1 for points in series.values()):
            charts.append(Chart(title, series))
    lines = [line for line in history if line.get("layer_sparsity")]
    if len(lines) > 1:
        layers = range(len(lines[0]["layer_sparsity"]))
        charts.append(
            Chart(
                "Sparsity by layer while training, random blocks included",
                {
                    f"layer {n + 1}": [(line["step"], line["layer_sparsity"][n]) for line in lines]
                    for n in layers
                },
            )
        )
    return charts
