"""``report`` and ``diagnose``: what a run of ``train``, or an adapter, reads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from dilated_attention_pytorch.analysis.diagnosis import Diagnosis, diagnose
from dilated_attention_pytorch.analysis.recording import Recording, byte_tokens, record
from dilated_attention_pytorch.analysis.report import Chart, render_report
from dilated_attention_pytorch.analysis.statistics import pattern_stability
from dilated_attention_pytorch.cli.console import (
    FAILURE,
    OK,
    CommandError,
    PlainConsole,
    UsageError,
    failing,
    write_page,
)
from dilated_attention_pytorch.cli.options import check_model_folder, require_transformers
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.tasks.text import TextError, read_text, validation_windows
from dilated_attention_pytorch.train.checkpoint import CheckpointError, list_checkpoints
from dilated_attention_pytorch.train.language_model import next_byte_loss
from dilated_attention_pytorch.train.loop import CHECKPOINTS_NAME, load_saved_run
from dilated_attention_pytorch.train.run_folder import PER_LAYER

if TYPE_CHECKING:
    from dilated_attention_pytorch.hf.job import SavedAdapter

_REMEDY = "lower --samples or --seq-len"
# Dense attention is computed to compare with, in quadratic time.
_LONGEST = 2048
_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def add_report(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "report",
        help="write a page that shows what a trained model reads",
        description="Writes one self-contained HTML file: block maps over the text, statistics of "
        "all heads, the diagnosis and the training curves of a run or of an adapter.",
    )
    parser.set_defaults(command=run_report)
    _add_options(parser, samples=4)
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE",
        help="the page (default: report.html)",
    )  # fmt: skip


def add_diagnose(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "diagnose",
        help="check whether selectors learn, and say what to do",
        description="Runs held-out text through the model of a run, or of an adapter, and "
        "checks every selector: verdict, evidence and remedy. Exit code 1 if a check fails.",
    )
    parser.set_defaults(command=run_diagnose)
    _add_options(parser, samples=8)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_options(parser: argparse.ArgumentParser, samples: int) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="RUN_OR_ADAPTER",
        help="--out of dilated-attention train, distill or tune, or the folder of an adapter",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="text to look at (default: what the run has held out, if the run is your own)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="DIR",
        help="base model of an adapter (default: the folder that it was made from)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=samples, metavar="N",
        help=f"windows of the text (default: {samples})",
    )  # fmt: skip
    parser.add_argument(
        "--seq-len", type=int, metavar="N",
        help="tokens per window of an adapter (default: as it was trained, at most 2048)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")


def run_report(parsed: argparse.Namespace) -> int:
    """Records, diagnoses and writes the page."""
    examined = _open(parsed)
    with _at_work("computing what is read, and what dense attention would read"):
        recording = examined.record()
        page = render_report(
            recording,
            title=f"What the heads of {examined.name} read",
            diagnosis=None if examined.unlearned else examined.diagnose(),
            charts=examined.charts,
            stability=examined.stability(recording),
        )
    write_page(parsed.out, page, PlainConsole())
    return OK


def run_diagnose(parsed: argparse.Namespace) -> int:
    """Prints the findings; 1 if one fails."""
    examined = _open(parsed, least=2)
    if examined.unlearned:
        raise CommandError(f"{parsed.folder} {examined.unlearned}; nothing in it learns to choose.")
    with _at_work("comparing what is read with dense attention"):
        diagnosis = examined.diagnose()
    if parsed.json:
        print(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        console = PlainConsole()
        console.print(f"Diagnosis of {examined.source}", soft_wrap=True)
        console.print(_table(diagnosis))
    return OK if diagnosis.healthy else FAILURE


def _table(diagnosis: Diagnosis) -> Table:
    table = Table(show_lines=True)
    table.add_column("verdict")
    table.add_column("question, evidence and remedy", overflow="fold")
    for found in diagnosis.findings:
        lines = [(found.question, "bold"), (found.evidence, ""), (found.remedy, "italic")]
        words = Text("\n").join(Text(printable(text), style) for text, style in lines if text)
        table.add_row(Text(found.verdict, _STYLES[found.verdict]), words)
    return table


@contextmanager
def _at_work(what: str) -> Iterator[None]:
    """Says what takes its time."""
    console = PlainConsole(stderr=True)
    if not console.is_terminal:
        console.print(f"{what} (minutes for a large model on a CPU)")
    with failing(_REMEDY), console.status(what):
        yield


@dataclass(frozen=True, eq=False)
class Examined:
    """A model and windows of text, ready to be recorded and diagnosed."""

    # What a page about it is called.
    name: str
    # What it is and where it lies, and of a run how far it was trained.
    source: str
    # What of its metrics could not be read.
    note: str | None
    # Why nothing in it learns to choose, as the end of a sentence; None: something does.
    unlearned: str | None
    record: Callable[[], Recording]
    # Only where something learns.
    diagnose: Callable[[], Diagnosis]
    charts: list[Chart]
    # How much of the patterns stayed since the checkpoint before; None: not known.
    stability: Callable[[Recording], Sequence[Sequence[float]] | None]


def _open(parsed: argparse.Namespace, least: int = 1) -> Examined:
    """Opens what the command line names, with ``least`` samples or more.

    Raises:
        UsageError: If an option is out of range or would be ignored.
        CommandError: If the folder is neither a run nor an adapter, or cannot be examined.
    """
    if parsed.samples < least:
        why = " (patterns of two inputs are compared)" if least > 1 else ""
        raise UsageError(f"--samples must be at least {least}{why}, got {parsed.samples}.")
    folder: Path = parsed.folder
    # The folder itself, or what a run of distill or tune has written there.
    places = (folder, folder / "adapter")
    adapter = next((place for place in places if (place / "adapter.json").is_file()), None)
    if adapter is None and not list_checkpoints(folder / CHECKPOINTS_NAME):
        raise CommandError(
            f"{folder} is neither a run (no checkpoint in it) nor an adapter (no adapter.json). "
            "Name the --out of dilated-attention train, distill or tune, or a folder that "
            "save_adapter wrote."
        )
    with failing(_REMEDY, OSError, ValueError, RuntimeError):
        examined = _open_run(parsed) if adapter is None else _open_adapter(adapter, parsed)
    if examined.note:
        PlainConsole(stderr=True).print(printable(examined.note), soft_wrap=True)
    return examined


def _open_run(parsed: argparse.Namespace) -> Examined:
    """A run of ``train``: its newest checkpoint, and the metrics up to it."""
    for name in ("model", "seq_len"):
        if getattr(parsed, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}: no effect on a run of train, which holds its own "
                "model; leave it out."
            )
    saved = load_saved_run(parsed.folder)
    run, history = saved.run, saved.history
    if run.attention == "dense":
        raise CommandError(f"{parsed.folder} is a run with dense attention: no block is chosen.")
    model = saved.model.to(parsed.device)
    windows = saved.held_out_windows(parsed.samples, parsed.text).to(parsed.device)
    source = f"{run.attention} attention, step {saved.step} of {run.steps}, {saved.folder}"
    fixed = f"is a run with fixed patterns ({run.attention})"

    def stability(now: Recording) -> list[list[float]] | None:
        if not saved.earlier:
            return None
        before = load_saved_run(saved.folder, saved.earlier[-1]).model.to(parsed.device)
        return pattern_stability(_record(before, windows), now)

    return Examined(
        name=saved.folder.resolve().name,
        source=source,
        note=saved.note,
        unlearned=None if run.attention == "adaptive" else fixed,
        record=lambda: _record(model, windows, source),
        diagnose=lambda: diagnose(model, windows, loss_function=next_byte_loss, history=history),
        charts=[
            *_chart("Loss on training batches, nats per byte", history, {"loss": "loss"}),
            *_chart("Held-out loss, nats per byte", history, {"validation_loss": "held-out loss"}),
            *_chart("Temperature", history, {"temperature": "temperature"}),
            *_layer_chart([line for line in history if line.get(PER_LAYER)]),
        ],
        stability=stability,
    )


def _record(model: nn.Module, windows: Tensor, source: str = "") -> Recording:
    return record(
        model,
        [window[None, :-1] for window in windows],
        texts=[byte_tokens(bytes(window[:-1].tolist())) for window in windows],
        max_samples=len(windows),
        source=source,
    )


def _open_adapter(folder: Path, parsed: argparse.Namespace) -> Examined:
    """An adapter on its base model."""
    require_transformers()
    from dilated_attention_pytorch.hf.job import SavedAdapter
    from dilated_attention_pytorch.hf.observe import (
        diagnose_adapted,
        record_adapted,
    )

    if parsed.model is not None:
        check_model_folder(parsed.model)
    saved = SavedAdapter.open(folder, parsed.model)
    tokenizer = saved.tokenizer()
    windows = _windows(saved, *_tokens(saved, tokenizer, parsed.text), parsed)
    adapted = saved.load(parsed.device)
    lora = "" if saved.lora is None else f" with the low-rank changes {saved.lora}"
    source = f"adapter {saved.folder} on {saved.base}{lora}"
    learns = any(isinstance(x, BlockSparseAdaptive) for x in adapted.selectors.values())
    history = saved.history
    return Examined(
        name=Path(saved.base).resolve().name,
        source=source,
        note=saved.note,
        unlearned=None if learns else "holds training-free selectors",
        record=lambda: record_adapted(adapted, windows[:, :-1], tokenizer, source=source),
        diagnose=lambda: diagnose_adapted(adapted, windows, history=history),
        charts=[
            *_chart("Loss on windows of the text, nats per token", history, {"loss": "loss"}),
            *_chart("Held-out loss, nats per token", history, {"validation_loss": "held-out loss"}),
        ],
        stability=lambda now: None,
    )


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
    seq_len = parsed.seq_len or min(saved.seq_len or _LONGEST, _LONGEST)
    needed = least if parsed.seq_len is None else seq_len
    if len(tokens) < needed + 1:
        raise TextError(
            f"too little text: {source} has {len(tokens):,} tokens, but a window of "
            f"{'two blocks' if parsed.seq_len is None else f'{seq_len:,}'} and the token to "
            f"predict need {needed + 1:,}. Give more text."
        )
    return validation_windows(tokens, min(seq_len, len(tokens) - 1), parsed.samples)


def _chart(
    title: str, history: Sequence[Mapping[str, Any]], fields: Mapping[str, str]
) -> list[Chart]:
    """A chart of fields of a metrics file, if all of them were logged at two steps or more."""
    series = {
        name: [(x["step"], x[field]) for x in history if isinstance(x.get(field), int | float)]
        for field, name in fields.items()
    }
    enough = bool(series) and all(len(points) > 1 for points in series.values())
    return [Chart(title, series)] if enough else []


def _layer_chart(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    # All of them speak of as many layers as the last one.
    lines = [x for x in lines if len(x[PER_LAYER]) == len(lines[-1][PER_LAYER])]
    if len(lines) < 2:
        return []
    series = {
        f"layer {n + 1}": [(line["step"], line[PER_LAYER][n]) for line in lines]
        for n in range(len(lines[-1][PER_LAYER]))
    }
    return [Chart("Sparsity by layer while training, random blocks included", series)]
