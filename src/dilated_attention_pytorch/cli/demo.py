"""``dilated-attention demo``: dense, adaptive and fixed attention side by side, in minutes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, TaskID, TimeElapsedColumn
from rich.table import Table

from dilated_attention_pytorch.atomic_file import write_atomically
from dilated_attention_pytorch.cli.bar import ProgressBar, words_column
from dilated_attention_pytorch.cli.console import PlainConsole
from dilated_attention_pytorch.cli.demo_jobs import QUICK, DemoSize, needle_job, text_job
from dilated_attention_pytorch.cli.demo_page import demo_page
from dilated_attention_pytorch.cli.errors import OK, CommandError
from dilated_attention_pytorch.cli.holding import holding
from dilated_attention_pytorch.cli.workers import Event, Job, run_jobs
from dilated_attention_pytorch.printable import printable

METHODS = ("dense", "adaptive", "local", "strided", "dilated")
DEFAULT_OUT = "demo-report"


def add_parser(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "demo",
        help="train dense, adaptive and fixed attention and compare them",
        description="Trains dense, adaptive and fixed-pattern attention on a needle task and on "
        "the Python standard library's sources, prints a table and writes a page. Takes a few "
        "minutes on two CPU cores; needs no GPU and no network.",
    )
    parser.set_defaults(command=run)
    parser.add_argument(
        "--out", type=Path, default=Path(DEFAULT_OUT), metavar="DIR",
        help=f"where the page goes, as index.html (default: {DEFAULT_OUT})",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="a few steps only, to see that everything runs"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the table as JSON (progress goes to stderr)"
    )


def run(parsed: argparse.Namespace) -> int:
    """Trains everything, prints the table and writes the page."""
    console = PlainConsole(stderr=parsed.json)
    size = QUICK if parsed.quick else DemoSize()
    page = parsed.out / "index.html"
    # Before the minutes of training, not after.
    with holding(parsed.out, console):
        start = time.perf_counter()
        results = _train(size, console)
        about = environment(time.perf_counter() - start)
        rows = table_rows(results)
        if parsed.json:
            print(json.dumps({"methods": rows, "environment": about, "page": str(page)}, indent=2))
        else:
            console.print(_table(rows))
        content = demo_page(results, rows, about, size).encode("utf-8", "backslashreplace")
        try:
            write_atomically(page, content)
        except OSError as error:
            raise CommandError(f"cannot write {page}: {error.strerror}.") from error
    console.print(f"Open {printable(page.resolve())} in a browser.", soft_wrap=True)
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


def environment(seconds: float) -> dict[str, str]:
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
