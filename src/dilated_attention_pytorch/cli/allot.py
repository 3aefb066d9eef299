"""``dilated-attention allot``: shares an adapter's budget among the layers of a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from dilated_attention_pytorch.cli.console import PlainConsole, shell_word
from dilated_attention_pytorch.cli.errors import OK, UsageError
from dilated_attention_pytorch.cli.folder_command import named_options
from dilated_attention_pytorch.cli.holding import holding
from dilated_attention_pytorch.cli.interrupt import StopRequest
from dilated_attention_pytorch.cli.measuring import measuring_bar, measuring_errors
from dilated_attention_pytorch.cli.pretrained_options import (
    add_model_and_text,
    check_model_folder,
    require_transformers,
)
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.selection.bounds import nothing_to_choose


def add_parser(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "allot",
        help="share an adapter's budget among the layers by what sparsity costs in each",
        description="Measures the loss with one layer sparse and the others dense, at several "
        "sparsities, on held-out text, and writes an adapter whose layers have the sparsities "
        "that cost least at the same mean. The same command again goes on where it stopped.",
    )
    parser.set_defaults(command=run)
    add_model_and_text(parser, required=True)
    parser.add_argument("--adapter", metavar="DIR", required=True, help="what distill wrote")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True,
        help="where costs.json and the new adapter go",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the shares as JSON")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", default=argparse.SUPPRESS,
        help="tokens per window: the lengths of use (default: 2048)",
    )  # fmt: skip
    for name, kind, what in (
        ("windows", int, "held-out windows per length (default: 3)"),
        ("max-bytes", int, "read as many bytes at most"),
        ("device", str, "cpu, cuda, ... (default: cpu)"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=argparse.SUPPRESS, help=what,
            metavar={int: "N", str: "NAME"}[kind],
        )  # fmt: skip
    parser.add_argument(
        "--dtype", default=argparse.SUPPRESS, choices=("float32", "bfloat16", "float16"),
        help="of the model's weights (default: float32)",
    )  # fmt: skip


def run(parsed: argparse.Namespace) -> int:
    """Measures and writes; returns the exit code."""
    require_transformers()
    from dilated_attention_pytorch.hf.layer_shares import AllotJob, Allotment

    console = PlainConsole(stderr=True)
    check_model_folder(parsed.model)
    try:
        job = AllotJob(**named_options(parsed))
    except ValueError as error:
        raise UsageError(str(error)) from error
    with holding(parsed.out, console), measuring_errors():
        allotment = Allotment(job, parsed.out)
        config = next(iter(allotment.source.configs.values()))
        for length in job.lengths:
            if words := nothing_to_choose(config, allotment.source.base_sparsity, length):
                console.print(words, soft_wrap=True)
        with StopRequest() as stop:
            finished = _measure(allotment, console, stop)
    if not finished:
        console.print(
            f"Stopped after {allotment.done} of {allotment.total} measurements, which "
            f"{shell_word(parsed.out)} keeps. The same command goes on.",
            soft_wrap=True,
        )  # fmt: skip
        return stop.exit_code
    _print(allotment, parsed)
    return OK


def _measure(allotment: Any, console: PlainConsole, stop: StopRequest) -> bool:
    """Whether all was measured and the adapter written."""
    with measuring_bar(console) as bar:
        task = bar.add_task("measuring", total=allotment.total, completed=allotment.done)
        for length, layer in allotment.steps():
            words = f"{length:,} tokens, layer {layer}"
            bar.update(task, completed=allotment.done, description=words)
            if stop():
                return False
    return True


def _print(allotment: Any, parsed: argparse.Namespace) -> None:
    mean = allotment.source.base_sparsity
    shares = {costs.length: costs.allot(mean) for costs in allotment.costs()}
    noise = {costs.length: costs.noise for costs in allotment.costs()}
    if parsed.json:
        print(json.dumps({"adapter": str(parsed.out / "adapter"), "sparsity": mean,
                          "layers": shares, "noise": noise}, indent=2))  # fmt: skip
        return
    table = Table(title=f"sparsity by layer, {mean:g} in the mean", title_justify="left")
    table.add_column("layer", justify="right")
    for length in shares:
        table.add_column(f"{length:,} tokens", justify="right")
    for layer in allotment.source.configs:
        table.add_row(str(layer), *(f"{found[layer]:.3f}" for found in shares.values()))
    PlainConsole().print(table)
    if any(noise.values()):
        found = ", ".join(f"{value:.5f} at {length:,} tokens" for length, value in noise.items())
        PlainConsole().print(
            f"Noise of a cost (nats): {found}. Shares differ as far as costs stand out of it; more "
            "--windows lower it.", soft_wrap=True,
        )  # fmt: skip
    place = printable(parsed.out / "adapter")
    PlainConsole().print(f"The adapter is in {place}.", soft_wrap=True)
