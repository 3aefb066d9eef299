"""Where a recorded number comes from: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def commit() -> str:
    """The checked-out commit, or ``PROJECT_COMMIT`` where there is no repository."""
    named = os.environ.get("PROJECT_COMMIT")
    if named is not None:
        return named
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions and commit of a run on ``"cpu"`` or ``"cuda"``."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if device == "cuda":
        import triton

        found["triton"] = triton.__version__
    return found


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.machine()


def where(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """A table of the machines, versions and commits that runs come from, as lines."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for run in runs:
        place = run["environment"]
        found[place["device"], place["torch"]].add(place["commit"])
    rows = (f"| {' | '.join(key)} | {' '.join(sorted(x))} |" for key, x in sorted(found.items()))
    return ["| ran on | torch | commits |", "|---|---|---|", *rows, ""]
