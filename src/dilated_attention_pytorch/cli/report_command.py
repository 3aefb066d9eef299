"""``dilated-attention report``: one page that shows what a model reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.analysis.report import render_report
from dilated_attention_pytorch.cli.console import PlainConsole
from dilated_attention_pytorch.cli.errors import OK, CommandError
from dilated_attention_pytorch.cli.examine_options import add_options, at_work, open_examined
from dilated_attention_pytorch.files import write_atomically
from dilated_attention_pytorch.foreign_text import printable

DEFAULT_OUT = "report.html"


def add_parser(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "report",
        help="write a page that shows what a trained model reads",
        description="Writes one self-contained HTML file: block maps over the text, statistics of "
        "all heads, the diagnosis and the training curves of a run or of an adapter.",
    )
    parser.set_defaults(command=run)
    add_options(parser, samples=4)
    parser.add_argument(
        "--out", type=Path, default=Path(DEFAULT_OUT), metavar="FILE",
        help=f"the page (default: {DEFAULT_OUT})",
    )  # fmt: skip


def run(parsed: argparse.Namespace) -> int:
    """Records, diagnoses and writes the page."""
    examined = open_examined(parsed)
    with at_work("computing what is read, and what dense attention would read"):
        recording = examined.record()
        page = render_report(
            recording,
            title=f"What the heads of {examined.name} read",
            diagnosis=None if examined.unlearned else examined.diagnose(),
            charts=examined.charts(),
            stability=examined.stability(recording),
        )
    try:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(parsed.out, page.encode("utf-8", "backslashreplace"))
    except (OSError, ValueError) as error:
        # A name that the system cannot have is a ValueError.
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot write {parsed.out}: {reason}.") from error
    place = printable(parsed.out.resolve())
    PlainConsole().print(f"Open {place} in a browser.", soft_wrap=True)
    return OK
