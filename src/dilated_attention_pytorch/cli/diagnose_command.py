"""``dilated-attention diagnose``: what is wrong with a run or an adapter, and what to do."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table
from rich.text import Text

from dilated_attention_pytorch.analysis import Diagnosis
from dilated_attention_pytorch.cli.console import PlainConsole, styled
from dilated_attention_pytorch.cli.errors import FAILURE, OK, CommandError
from dilated_attention_pytorch.cli.examine_options import add_options, at_work, open_examined

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def add_parser(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "diagnose",
        help="check whether selectors learn, and say what to do",
        description="Runs held-out text through the model of a run, or of an adapter, and "
        "checks every selector: verdict, evidence and remedy. Exit code 1 if a check fails.",
    )
    parser.set_defaults(command=run)
    add_options(parser, samples=8)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(parsed: argparse.Namespace) -> int:
    """Prints the findings; 1 if one fails."""
    examined = open_examined(parsed, least=2)
    if examined.unlearned:
        raise CommandError(f"{parsed.folder} {examined.unlearned}; nothing in it learns to choose.")
    with at_work("comparing what is read with dense attention"):
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
    for finding in diagnosis.findings:
        style = _STYLES[finding.verdict]
        lines = [styled(finding.question, "bold"), styled(finding.evidence, "")]
        if finding.remedy:
            lines.append(styled(finding.remedy, "italic"))
        table.add_row(styled(finding.verdict, style), Text("\n").join(lines))
    return table
