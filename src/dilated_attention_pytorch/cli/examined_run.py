"""A run of ``dilated-attention train`` as ``report`` and ``diagnose`` look at it."""

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
from dilated_attention_pytorch.cli.examined import Examined, line_chart
from dilated_attention_pytorch.train.language_model import next_byte_loss
from dilated_attention_pytorch.train.loop import SavedRun, load_saved_run
from dilated_attention_pytorch.train.run_folder import PER_LAYER


@dataclass(frozen=True, eq=False)
class ExaminedRun(Examined):
    """A run and the windows to look at, ``(samples, seq_len + 1)`` int64, on a device."""

    saved: SavedRun
    windows: Tensor

    @classmethod
    def open(cls, folder: Path, text: Path | None, samples: int, device: str) -> ExaminedRun:
        """Reads a run and its windows.

        Raises:
            CommandError: If either cannot be read, or the run's attention is dense.
        """
        try:
            saved = load_saved_run(folder)
            if saved.run.attention == "dense":
                raise CommandError(f"{folder} is a run with dense attention: no block is chosen.")
            saved.model.to(device)
            return cls(saved, saved.held_out_windows(samples, text).to(device))
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(str(error)) from error

    @property
    def name(self) -> str:
        """The folder's."""
        return self.saved.folder.resolve().name

    @property
    def source(self) -> str:
        """Kind of attention, step and folder."""
        saved, run = self.saved, self.saved.run
        return f"{run.attention} attention, step {saved.step} of {run.steps}, {saved.folder}"

    @property
    def note(self) -> str | None:
        """Lines of the metrics that are left out."""
        return self.saved.note

    @property
    def unlearned(self) -> str | None:
        """Fixed patterns cannot fail to learn."""
        attention = self.saved.run.attention
        if attention == "adaptive":
            return None
        return f"is a run with fixed patterns ({attention})"

    def diagnose(self) -> Diagnosis:
        """Judges the newest checkpoint and the metrics up to it."""
        return diagnose(
            self.saved.model,
            self.windows,
            loss_function=next_byte_loss,
            history=self.saved.history,
        )

    def record(self) -> Recording:
        """What the newest checkpoint reads."""
        return _record(self.saved.model, self.windows, self.source)

    def stability(self, now: Recording) -> Sequence[Sequence[float]] | None:
        """Compares with the checkpoint before; None: there is none."""
        if not self.saved.earlier:
            return None
        before = load_saved_run(self.saved.folder, self.saved.earlier[-1])
        model = before.model.to(self.windows.device)
        return pattern_stability(_record(model, self.windows, ""), now)

    def charts(self) -> list[Chart]:
        """Losses, temperature and the sparsity of every layer."""
        history = self.saved.history
        charts = [
            *line_chart("Loss on training batches, nats per byte", history, {"loss": "loss"}),
            *line_chart(
                "Held-out loss, nats per byte", history, {"validation_loss": "held-out loss"}
            ),
            *line_chart("Temperature", history, {"temperature": "temperature"}),
        ]
        return charts + _layer_chart([line for line in history if line.get(PER_LAYER)])


def _record(model: nn.Module, windows: Tensor, source: str) -> Recording:
    texts = [byte_tokens(bytes(window[:-1].tolist())) for window in windows]
    return record(
        model,
        [window[None, :-1] for window in windows],
        texts=texts,
        max_samples=len(windows),
        source=source,
    )


def _layer_chart(lines: Sequence[dict[str, Any]]) -> list[Chart]:
    # All of them speak of as many layers as the last one.
    lines = [x for x in lines if len(x[PER_LAYER]) == len(lines[-1][PER_LAYER])]
    if len(lines) < 2:
        return []
    series = {
        f"layer {n + 1}": [(line["step"], line[PER_LAYER][n]) for line in lines]
        for n in range(len(lines[-1][PER_LAYER]))
    }
    return [Chart("Sparsity by layer while training, random blocks included", series)]
