"""``dilated-attention demo``: dense, adaptive and fixed attention side by side, in minutes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, TaskID, TimeElapsedColumn
from rich.table import Table

from dilated_attention_pytorch.analysis.report import render_page
from dilated_attention_pytorch.cli.console import (
    OK,
    CommandError,
    PlainConsole,
    ProgressBar,
    words_column,
    write_page,
)
from dilated_attention_pytorch.cli.jobs import holding
from dilated_attention_pytorch.tasks.needle import (
    NeedleRun,
    NeedleTask,
    build_needle_model,
    needle_config,
    train_needle,
)
from dilated_attention_pytorch.tasks.text import load_text
from dilated_attention_pytorch.train.language_model import LanguageModelRun, LanguageModelTraining

# Tells how far a job is: share done in [0, 1], and a few words.
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Job:
    """One piece of work, under the name that the user sees."""

    name: str
    # Called as function(report, *arguments); importable by name, as the result is.
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    # Expected share of the whole, for the progress.
    weight: float = 1.0


@dataclass(frozen=True)
class Event:
    """News of a job: its number, the share done, words, and the result once there is one."""

    number: int
    share: float
    words: str
    result: Any = None
    error: str | None = None


def run_jobs(jobs: Sequence[Job], processes: int, on_event: Callable[[Event], None]) -> list[Any]:
    """Runs all jobs, some ``processes`` at once, and returns their results in order.

    Raises:
        CommandError: If a job fails or its process dies.
    """
    context = multiprocessing.get_context("spawn")
    numbers: Queue[int | None] = context.Queue()
    events: Queue[Event] = context.Queue()
    for number in [*range(len(jobs)), *[None] * processes]:
        numbers.put(number)
    workers = [
        context.Process(target=_work, args=(list(jobs), numbers, events), daemon=True)
        for _ in range(processes)
    ]
    results: dict[int, Any] = {}
    try:
        with _ctrl_c_held_back():
            for worker in workers:
                worker.start()
        while len(results) < len(jobs):
            try:
                event = events.get(timeout=0.5)
            except queue.Empty:
                _check_alive(workers)
                continue
            if event.error is not None:
                raise CommandError(f"{jobs[event.number].name} failed: {event.error}")
            if event.result is not None:
                results[event.number] = event.result
            on_event(event)
    finally:
        started = [worker for worker in workers if worker.pid is not None]
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.join()
        for channel in (numbers, events):
            channel.cancel_join_thread()
            channel.close()
    return [results[number] for number in range(len(jobs))]


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Delivers a Ctrl-C afterwards; processes started meanwhile never see one.

    A process that is still importing cannot have told the system yet that it ignores Ctrl-C, and
    one that is half started when its parent is interrupted would be left behind.
    """
    heard: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    # Blocking alone is not enough: the system hands the signal to any other thread of this process.
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number)) if main else None
    blocks = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if blocks else set()
    try:
        yield
    finally:
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
    if heard:
        signal.raise_signal(signal.SIGINT)


def _check_alive(workers: Sequence[Any]) -> None:
    for worker in workers:
        if worker.exitcode not in (None, 0):
            raise CommandError(
                f"a training process ended with exit code {worker.exitcode}; if that is -9, the "
                "machine has probably run out of memory."
            )


def _work(jobs: list[Job], numbers: Queue[int | None], events: Queue[Event]) -> None:
    # Ctrl-C reaches the whole group; the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    while (number := numbers.get()) is not None:
        job, index = jobs[number], number

        def report(share: float, words: str, index: int = index) -> None:
            if parent is not None and not parent.is_alive():
                os._exit(1)
            events.put(Event(index, share, words))

        try:
            result = job.function(report, *job.arguments)
            events.put(Event(number, 1.0, "done", result=result))
        except Exception as error:  # whatever it was, the parent shows it
            words = " ".join("".join(traceback.format_exception_only(error)).split())
            events.put(Event(number, 0.0, "failed", error=words))
            return


# By method: what the page says of it.
METHODS = {
    "dense": "reads everything",
    "adaptive": "learns what to read from the content",
    "local": "the nearest blocks",
    "strided": "every n-th block, by head",
    "dilated": "a lattice, shifted by head",
}
# Bytes that a reader of the page sees as they are.
_READABLE = frozenset({9, 10, *range(32, 127)})


@dataclass(frozen=True)
class DemoSize:
    """How much to train."""

    # Smaller than that of experiments/needle.py. Dense attention and the best fixed pattern leave
    # their initial plateau within the steps below; with 500 steps they did not.
    needle: NeedleTask = field(default_factory=lambda: NeedleTask(seq_len=384, num_keys=48))
    needle_steps: int = 1200
    # Steps between two measurements.
    needle_every: int = 100
    text_steps: int = 120
    text_bytes: int = 4_000_000
    seq_len: int = 512


QUICK = DemoSize(
    needle=NeedleTask(seq_len=64, num_keys=8),
    needle_steps=4,
    needle_every=2,
    text_steps=12,
    text_bytes=200_000,
    seq_len=128,
)


def add_demo(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "demo",
        help="train dense, adaptive and fixed attention and compare them",
        description="Trains dense, adaptive and fixed-pattern attention on a needle task and on "
        "the Python standard library's sources, prints a table and writes a page. Takes a few "
        "minutes on two CPU cores; needs no GPU and no network.",
    )
    parser.set_defaults(command=demo)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-report"), metavar="DIR",
        help="where the page goes, as index.html (default: demo-report)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="a few steps only, to see that everything runs"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the table as JSON (progress goes to stderr)"
    )


def demo(parsed: argparse.Namespace) -> int:
    """Trains everything, prints the table and writes the page."""
    console = PlainConsole(stderr=parsed.json)
    size = QUICK if parsed.quick else DemoSize()
    page = parsed.out / "index.html"
    # Before the minutes of training, not after.
    with holding(parsed.out, console):
        start = time.perf_counter()
        results = _train(size, console)
        about = _environment(time.perf_counter() - start)
        rows = table_rows(results)
        if parsed.json:
            print(json.dumps({"methods": rows, "environment": about, "page": str(page)}, indent=2))
        else:
            console.print(_table(rows))
        write_page(page, demo_page(results, rows, about, size), console)
    return OK


def _train(size: DemoSize, console: PlainConsole) -> dict[str, dict[str, Any]]:
    """Runs all jobs, in two processes where there are two cores."""
    # The longest first: the last jobs to end are then short ones, and no core waits long.
    jobs = [Job(f"text, {m}", text_job, (m, size), weight=2.0) for m in METHODS]
    jobs += [Job(f"needle, {m}", needle_job, (m, size)) for m in METHODS]
    processes = min(2, os.cpu_count() or 1)
    console.print(
        f"Training {len(METHODS)} kinds of attention on text and on a needle task: "
        f"{len(jobs)} small models, {processes} at a time."
    )
    shares = [0.0] * len(jobs)
    columns = (
        words_column("{task.description:<18}"),
        BarColumn(bar_width=24),
        words_column("{task.percentage:>3.0f}%"),
        words_column("{task.fields[words]}"),
        TimeElapsedColumn(),
    )
    with ProgressBar(*columns, console=console) as bar:
        whole = bar.add_task("all", total=sum(job.weight for job in jobs), words="")
        lines: dict[int, TaskID] = {}

        def show(event: Event) -> None:
            job = jobs[event.number]
            if event.number not in lines:
                lines[event.number] = bar.add_task(job.name, total=1.0, words="")
            bar.update(lines[event.number], completed=event.share, words=event.words)
            shares[event.number] = event.share
            done = sum(s * job.weight for s, job in zip(shares, jobs, strict=True))
            bar.update(whole, completed=done)
            if event.result is not None:
                bar.update(lines[event.number], visible=False)
                seconds = event.result["seconds"]
                bar.console.print(f"  {job.name}: {seconds:.0f} s")

        outcomes = run_jobs(jobs, processes, show)
    count = len(METHODS)
    return {
        method: {"text": outcomes[number], "needle": outcomes[count + number]}
        for number, method in enumerate(METHODS)
    }


def table_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of the table, one row per method."""
    return [
        {
            "attention": method,
            "needle_sparsity": result["needle"]["sparsity"],
            "needle_accuracy": result["needle"]["accuracy"],
            "text_sparsity": result["text"]["sparsity"],
            "text_loss": result["text"]["loss"],
            "text_bits_per_byte": result["text"]["bits"],
            "seconds": result["needle"]["seconds"] + result["text"]["seconds"],
        }
        for method, result in results.items()
    ]


def _environment(seconds: float) -> dict[str, str]:
    """Hardware and versions, for the foot of the page."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "minutes": f"{seconds / 60:.1f}",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="One run each, one seed", title_justify="left")
    table.add_column("attention")
    for heading in (
        "needle\nsparsity", "needle\naccuracy", "text\nsparsity", "held-out loss\nnats/byte",
        "seconds",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["attention"],
            f"{row['needle_sparsity']:.2f}",
            f"{row['needle_accuracy']:.3f}",
            f"{row['text_sparsity']:.2f}",
            f"{row['text_loss']:.3f}",
            f"{row['seconds']:.0f}",
            style="bold" if row["attention"] == "adaptive" else None,
        )
    return table


def needle_job(report: Report, method: str, size: DemoSize) -> dict[str, Any]:
    """Trains one method on the needle task."""
    torch.set_num_threads(1)
    task = size.needle
    run = NeedleRun(
        method,
        needle_config(task),
        steps=size.needle_steps,
        batch_size=8,
        learning_rate=5e-3,
        task=task,
    )
    model = build_needle_model(run)
    curve = []
    for progress in train_needle(run, model, size.needle_every):
        curve.append([progress.step, progress.accuracy])
        report(progress.step / run.steps, f"accuracy {progress.accuracy:.2f}")
    batch = task.batch(1, torch.Generator().manual_seed(7))
    model.eval()
    with torch.no_grad():
        logits, answers = model(batch)
        infos = model.transformer.patterns(model.embed(batch))
    blocks = task.seq_len // task.block_size
    return {
        "curve": curve,
        "accuracy": progress.accuracy,
        "sparsity": 0.0 if progress.sparsity is None else progress.sparsity,
        "seconds": progress.seconds,
        "layers": block_lists(infos, run.num_layers, blocks),
        "answers": batch.target[0].tolist(),
        # Nothing is asked in the first block.
        "right": [None, *(logits.argmax(-1) == answers).tolist()],
    }


def text_job(report: Report, method: str, size: DemoSize) -> dict[str, Any]:
    """Trains one method as a byte-level language model."""
    text = load_text(max_bytes=size.text_bytes, seq_len=size.seq_len)
    # What ``train`` sets; fixed patterns leave out as much.
    run = LanguageModelRun(
        attention=method,
        seq_len=size.seq_len,
        batch_size=4,
        steps=size.text_steps,
        validation_sequences=64,
        threads=1,
    )
    training = LanguageModelTraining(run, text)
    losses: list[float] = []
    curve = []
    every = max(1, size.text_steps // 15)
    while not training.done:
        losses.append(training.step().loss)
        if len(losses) == every or training.done:
            mean = sum(losses) / len(losses)
            curve.append([training.step_count, mean])
            report(training.step_count / run.steps, f"loss {mean:.2f}")
            losses = []
    measured = training.validate()
    window = _readable_window(training.validation)
    with torch.no_grad():
        infos = training.model.eval().patterns(window[None, :-1])
    shown = bytes(window[:-1].tolist())
    block_size = run.config.block_size
    cuts = range(0, len(shown), block_size)
    return {
        "curve": curve,
        "loss": measured.loss,
        "bits": measured.bits_per_byte,
        "sparsity": 0.0 if measured.sparsity is None else measured.sparsity,
        "seconds": training.seconds,
        "layers": block_lists(infos, run.num_layers, len(cuts)),
        "blocks": [shown[a : a + block_size].decode("ascii", "replace") for a in cuts],
        "block_size": block_size,
        "seen_bytes": run.steps * run.batch_size * run.seq_len,
        "heads": run.num_heads,
    }


def block_lists(
    infos: list[dict[str, Any]], num_layers: int, blocks: int
) -> list[list[list[list[int]]]]:
    """Key blocks by layer, head and query block of the first sample; no infos: dense."""
    if not infos:
        everything = [list(range(row + 1)) for row in range(blocks)]
        return [[everything] for _ in range(num_layers)]
    return [
        [
            [row.nonzero().flatten().tolist() for row in head]
            for head in info["pattern"].to_dense()[0]
        ]
        for info in infos
    ]


def _readable_window(windows: torch.Tensor) -> torch.Tensor:
    """The held-out window that reads most like prose: in the library, a docstring amid code."""

    def letters(window: torch.Tensor) -> float:
        values = window.tolist()
        if not _READABLE.issuperset(values):
            return 0.0
        return sum(value == 32 or 97 <= value <= 122 for value in values) / len(values)

    return max(windows, key=letters)


def demo_page(
    results: dict[str, dict[str, Any]],
    rows: list[dict[str, Any]],
    environment: dict[str, str],
    size: DemoSize,
) -> str:
    """The page of what the jobs returned by method, of the table, the hardware and the size."""
    text = next(iter(results.values()))["text"]
    return render_page(
        "demo",
        results,
        rows="".join(_row(row) for row in rows),
        needle_result=_needle_result(rows),
        text_result=_text_result(rows),
        blocks=size.needle.seq_len // size.needle.block_size,
        needle_tokens=size.needle.seq_len,
        needle_block=size.needle.block_size,
        needle_steps=f"{size.needle_steps:,}",
        chance=f"{1 / size.needle.num_values:.1%}",
        text_steps=f"{size.text_steps:,}",
        text_tokens=size.seq_len,
        text_block=text["block_size"],
        text_heads=text["heads"],
        text_layers=len(text["layers"]),
        seen=f"{text['seen_bytes'] / 1e6:.2f}",
        environment=escape(
            "{processor}, {cores} cores, Python {python}, torch {torch}, {date}; {minutes} minutes "
            "in all".format(**environment)
        ),
    )


def _row(row: dict[str, Any]) -> str:
    name = row["attention"]
    return (
        f'<tr class="{"own" if name == "adaptive" else ""}"><th scope="row">'
        f'<span class="key" data-method="{name}"></span>{name}'
        f"<small>{METHODS[name]}</small></th>"
        f"<td>{row['needle_sparsity']:.2f}</td><td>{row['needle_accuracy']:.1%}</td>"
        f"<td>{row['text_sparsity']:.2f}</td><td>{row['text_loss']:.3f}</td>"
        f"<td>{row['text_bits_per_byte']:.3f}</td><td>{row['seconds']:.0f}</td></tr>"
    )


def _needle_result(rows: list[dict[str, Any]]) -> str:
    """What the numbers of this run say, whatever they are."""
    by_name = {row["attention"]: row for row in rows}
    adaptive = by_name["adaptive"]
    fixed = [row for row in rows if row["attention"] not in ("adaptive", "dense")]
    best = max(fixed, key=lambda row: row["needle_accuracy"])
    return (
        f"Adaptive attention answers <b>{adaptive['needle_accuracy']:.1%}</b> of the questions "
        f"while it computes {1 - adaptive['needle_sparsity']:.0%} of the tiles. The best fixed "
        f"pattern with the same number of tiles, {best['attention']}, answers "
        f"<b>{best['needle_accuracy']:.1%}</b>; dense attention, with all tiles, "
        f"<b>{by_name['dense']['needle_accuracy']:.1%}</b>."
    )


def _text_result(rows: list[dict[str, Any]]) -> str:
    ranked = sorted(rows, key=lambda row: row["text_loss"])
    place = [row["attention"] for row in ranked].index("adaptive") + 1
    losses = ", ".join(f"{row['attention']} {row['text_loss']:.3f}" for row in ranked)
    return (
        f"Held-out loss in nats per byte, lowest first: {losses}. Adaptive attention comes out "
        f"number {place} of {len(ranked)} in this run, and the losses span "
        f"{ranked[-1]['text_loss'] - ranked[0]['text_loss']:.3f}."
    )
