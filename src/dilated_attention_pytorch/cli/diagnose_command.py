"""``dilated-attention diagnose``: what is wrong with a run, and what to do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dilated_attention_pytorch.analysis import Diagnosis
from dilated_attention_pytorch.cli.errors import FAILURE, OK, CommandError, UsageError
from dilated_attention_pytorch.cli.recorded import Examined

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def add_parser(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "diagnose",
        help="check whether the selectors of a run learn, and say what to do",
        description="Runs held-out text through a run's model and checks every selector: verdict, "
        "evidence and remedy. Exit code 1 if a check fails.",
    )
    parser.set_defaults(command=run)
    parser.add_argument("run", type=Path, metavar="RUN", help="--out of dilated-attention train")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text to use (default: the held-out text)"
    )
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="windows of it (default: 8)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(parsed: argparse.Namespace) -> int:
    """Prints the findings; 1 if one fails."""
    if parsed.samples < 2:
        raise UsageError(
            f"--samples must be at least 2 (patterns of two inputs are compared), got "
            f"{parsed.samples}."
        )
    examined = Examined.open(parsed.run, parsed.text, parsed.samples)
    diagnosis = examined.diagnose()
    if diagnosis is None:
        raise CommandError(
            f"{parsed.run} is a run with fixed patterns ({examined.saved.run.attention}); nothing "
            "in it learns to choose."
        )
    if parsed.json:
        print(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        Console().print(_table(diagnosis))
    return OK if diagnosis.healthy else FAILURE


def _table(diagnosis: Diagnosis) -> Table:
    table = Table(title="Diagnosis", title_justify="left", show_lines=True)
    table.add_column("verdict")
    table.add_column("question, evidence and remedy", overflow="fold")
    for finding in diagnosis.findings:
        style = _STYLES[finding.verdict]
        words = f"[bold]{finding.question}[/bold]\n{finding.evidence}"
        if finding.remedy:
            words += f"\n[italic]{finding.remedy}[/italic]"
        table.add_row(f"[{style}]{finding.verdict}[/{style}]", words)
    return table
