"""What a long run of a guard leaves behind: a file of numbers, and what they were counted on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def write_report(
    path: Path | None, cases: int, wrong: int, *, gpu: bool = False, **more: Any
) -> None:
    """Writes the numbers of a run, its command line, its hardware and its commit.

    Args:
        path: Where to. None: nowhere.
        cases: How many were run.
        wrong: How many of them were wrong.
        gpu: Whether they ran on a GPU.
        **more: Whatever else the guard counts.
    """
    if path is None:
        return
    # Some guards set variables that it reads.
    import torch

    hardware = torch.cuda.get_device_name() if gpu else f"CPU, {platform.machine()}"
    report = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cases": cases,
        "wrong": wrong,
        "hardware": hardware,
        "torch": torch.__version__,
        "commit": _commit(),
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _commit() -> str:
    """Of this checkout, marked where files differ from it; ``PROJECT_COMMIT`` outside of one."""
    named = os.environ.get("PROJECT_COMMIT")
    if named is not None:
        return named
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip()
