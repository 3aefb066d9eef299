"""An adapter of a pretrained model as ``report`` and ``diagnose`` look at it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dilated_attention_pytorch.analysis import Diagnosis, Recording
from dilated_attention_pytorch.analysis.report import Chart
from dilated_attention_pytorch.cli.errors import CommandError, UsageError
from dilated_attention_pytorch.cli.examined import Examined, line_chart
from dilated_attention_pytorch.cli.pretrained_options import (
    check_model_folder,
    require_transformers,
)
from dilated_attention_pytorch.tasks.text import TextError, read_text, validation_windows
from dilated_attention_pytorch.train.checkpoint import CheckpointError

if TYPE_CHECKING:
    from dilated_attention_pytorch.hf.adapt import AdaptedModel
    from dilated_attention_pytorch.hf.job import SavedAdapter

# Dense attention is computed to compare with, in quadratic time.
DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True, eq=False)
class ExaminedAdapter(Examined):
    """An adapter on its base model, and the windows to look at.

    Attributes:
        saved: The adapter's folder.
        adapted: The base model with the selectors.
        tokenizer: Of the base model.
        windows: ``(samples, seq_len + 1)`` int64.
    """

    saved: SavedAdapter
    adapted: AdaptedModel
    tokenizer: Any
    windows: Tensor

    @property
    def name(self) -> str:
        """The base model's."""
        return Path(self.saved.base).resolve().name

    @property
    def source(self) -> str:
        """Folders of the adapter, of its base and of the low-rank changes."""
        saved = self.saved
        lora = "" if saved.lora is None else f" with the low-rank changes {saved.lora}"
        return f"adapter {saved.folder} on {saved.base}{lora}"

    @property
    def note(self) -> str | None:
        """Lines of the metrics that are left out."""
        return self.saved.note

    @property
    def unlearned(self) -> str | None:
        """Training-free selectors do not learn."""
        from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive

        selectors = self.adapted.selectors.values()
        if any(isinstance(selector, BlockSparseAdaptive) for selector in selectors):
            return None
        return "holds training-free selectors"

    def diagnose(self) -> Diagnosis:
        """Judges the selectors on the next token's loss."""
        from dilated_attention_pytorch.hf.observe import diagnose_adapted

        return diagnose_adapted(self.adapted, self.windows, history=self.saved.history)

    def record(self) -> Recording:
        """What the adapted model reads."""
        from dilated_attention_pytorch.hf.observe import record_adapted

        return record_adapted(
            self.adapted, self.windows[:, :-1], self.tokenizer, source=self.source
        )

    def charts(self) -> list[Chart]:
        """Losses, and how well the true top blocks were found."""
        history = self.saved.history
        levels = sorted(
            {name.removeprefix("recall_") for line in history for name in line if "recall_" in name}
        )
        kept = {f"kept_mass_{s}": f"kept at sparsity {s}" for s in levels}
        best = {f"best_mass_{s}": f"best choice at {s}" for s in levels}
        return [
            *line_chart("Loss on training batches, nats", history, {"loss": "loss"}),
            *line_chart(
                "Held-out loss, nats per token", history, {"validation_loss": "held-out loss"}
            ),
            *line_chart(
                "Recall of the true top blocks", history,
                {f"recall_{s}": f"sparsity {s}" for s in levels},
            ),
            *line_chart("Share of dense attention that is kept", history, kept | best),
        ]  # fmt: skip


def open_adapter(folder: Path, parsed: argparse.Namespace) -> ExaminedAdapter:
    """Opens an adapter, with the options of the command line.

    Raises:
        UsageError: If ``--seq-len`` is out of range.
        CommandError: If adapter, base, tokenizer or text are missing or do not fit.
    """
    require_transformers()
    from dilated_attention_pytorch.hf.job import SavedAdapter

    if parsed.model is not None:
        check_model_folder(parsed.model)
    try:
        saved = SavedAdapter.open(folder, parsed.model)
        tokenizer = saved.tokenizer()
        tokens, source = _tokens(saved, tokenizer, parsed.text)
        windows = _windows(saved, tokens, source, parsed)
        return ExaminedAdapter(saved, saved.load(parsed.device), tokenizer, windows)
    except torch.OutOfMemoryError as error:
        raise CommandError(f"out of memory; lower --samples or --seq-len. {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error


def _tokens(saved: SavedAdapter, tokenizer: Any, text: Path | None) -> tuple[Tensor, str]:
    """The tokens to cut windows from, and what they are, in words."""
    from dilated_attention_pytorch.hf.model_folder import tokenize

    if text is not None:
        return tokenize(tokenizer, read_text(text)), str(text)
    try:
        return saved.held_out(), "the run's held-out text"
    except CheckpointError as error:
        raise CommandError(
            f"no held-out text for {saved.folder}: {error} Give --text FILE."
        ) from error


def _windows(
    saved: SavedAdapter, tokens: Tensor, source: str, parsed: argparse.Namespace
) -> Tensor:
    """Windows of at least two blocks, as long as asked for or as the text and the model allow."""
    block_size = max(config.block_size for config in saved.adapter.configs.values())
    least = 2 * block_size
    if parsed.seq_len is not None and parsed.seq_len < least:
        raise UsageError(
            f"--seq-len must be at least {least}, two blocks, got {parsed.seq_len}: there would be "
            "nothing to choose."
        )
    seq_len = parsed.seq_len or min(saved.seq_len or DEFAULT_SEQ_LEN, DEFAULT_SEQ_LEN)
    needed = least if parsed.seq_len is None else seq_len
    if len(tokens) < needed + 1:
        raise TextError(
            f"too little text: {source} has {len(tokens):,} tokens, but a window of "
            f"{'two blocks' if parsed.seq_len is None else f'{seq_len:,}'} and the token to "
            f"predict need {needed + 1:,}. Give more text."
        )
    return validation_windows(tokens, min(seq_len, len(tokens) - 1), parsed.samples)
