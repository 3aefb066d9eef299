"""``dilated-attention demo``: dense, adaptive and fixed attention side by side, in minutes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dilated_attention_pytorch.cli.demo_page import render_page
from dilated_attention_pytorch.cli.errors import OK
from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.tasks.needle import (
    NeedleRun,
    NeedleTask,
    build_needle_model,
    needle_config,
    train_needle,
)
from dilated_attention_pytorch.tasks.text import load_text
from dilated_attention_pytorch.training.checkpoint import write_atomically
from dilated_attention_pytorch.training.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
)

METHODS = ("adaptive", "dense", "strided", "local")
_MAX_BYTES = 4_000_000


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="train dense, adaptive and fixed attention and compare them"
    )
    parser.add_argument(
        "--out", default="demo-report", metavar="DIR", help="folder of the page (index.html)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    """Trains everything in two processes, prints the table and writes the page."""
    console = Console()
    console.print(
        "Training adaptive, dense, strided and local attention on a needle task and on the Python "
        "standard library's sources. This takes a few minutes."
    )
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        jobs: dict[Future[dict[str, Any]], tuple[str, str]] = {}
        for name in METHODS:
            jobs[pool.submit(needle_job, name, parsed.quick)] = (name, "needle")
        for name in METHODS:
            jobs[pool.submit(text_job, name, parsed.quick)] = (name, "text")
        try:
            for number, future in enumerate(as_completed(jobs), start=1):
                name, task = jobs[future]
                results[name][task] = future.result()
                seconds = results[name][task]["seconds"]
                console.print(f"  {number}/{len(jobs)}  {task}, {name}: {seconds:.0f} s")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    console.print(_table(results))
    folder = Path(parsed.out)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    write_atomically(page, render_page(results, environment()).encode())
    console.print(f"wrote {page}")
    return OK


def needle_job(name: str, quick: bool) -> dict[str, Any]:
    """Trains one method on the needle task, in a process of its own."""
    torch.set_num_threads(1)
    task = NeedleTask(seq_len=128) if quick else NeedleTask()
    steps, every = (4, 2) if quick else (900, 100)
    run = NeedleRun(name, needle_config(task), steps=steps, task=task)
    model = build_needle_model(run)
    curve = list(train_needle(run, model, every))
    batch = task.batch(1, torch.Generator().manual_seed(7))
    model.eval()
    with torch.no_grad():
        infos = model.transformer.patterns(model.embed(batch))
    return {
        "curve": [(p.step, p.accuracy) for p in curve],
        "accuracy": curve[-1].accuracy,
        "sparsity": 0.0 if curve[-1].sparsity is None else curve[-1].sparsity,
        "seconds": curve[-1].seconds,
        "maps": [info["pattern"].to_dense()[0].int().tolist() for info in infos],
        "answers": batch.target[0].tolist(),
    }


def text_job(name: str, quick: bool) -> dict[str, Any]:
    """Trains one method on text, in a process of its own."""
    text = load_text(max_bytes=200_000 if quick else _MAX_BYTES, seq_len=512)
    config = AdaptiveConfig(block_size=32, base_sparsity=0.7, query_scope="past")
    run = LanguageModelRun(
        attention=name,
        config=config,
        steps=2 if quick else 200,
        validation_sequences=4 if quick else 32,
        threads=1,
    )
    training = LanguageModelTraining(run, text)
    curve = []
    while not training.done:
        result = training.step()
        curve.append((result.step, result.loss))
    measured = training.validate()
    window = training.validation[:1]
    with torch.no_grad():
        infos = training.model.eval().patterns(window[:, :-1])
    return {
        "curve": curve,
        "loss": measured.loss,
        "sparsity": 0.0 if measured.sparsity is None else measured.sparsity,
        "seconds": training.seconds,
        "maps": [info["pattern"].to_dense()[0].int().tolist() for info in infos],
        "text": bytes(window[0, :-1].tolist()).decode("utf-8", "replace"),
    }


def environment() -> dict[str, str]:
    """Hardware and versions, for the foot of the page."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="needle task and language modelling, one run each")
    for heading in (
        "attention", "needle sparsity", "needle accuracy", "text sparsity",
        "held-out loss (nats/byte)", "seconds",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for name, result in results.items():
        needle, text = result["needle"], result["text"]
        table.add_row(
            name,
            f"{needle['sparsity']:.2f}",
            f"{needle['accuracy']:.3f}",
            f"{text['sparsity']:.2f}",
            f"{text['loss']:.3f}",
            f"{needle['seconds'] + text['seconds']:.0f}",
        )
    return table
