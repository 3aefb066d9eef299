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

ROOT = Path(__file__).parents[1]
# What a run writes itself, and pages about it, do not make it another program.
_WRITTEN = (":(exclude)benchmarks/results", ":(exclude)experiments/results", ":(exclude)docs")


def commit() -> str:
    """The checked-out commit, or ``PROJECT_COMMIT`` where there is no repository.

    It ends in ``-dirty`` where a tracked file differs that is no result and no page.
    """
    named = os.environ.get("PROJECT_COMMIT")
    if named is not None:
        return named

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    found = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN)
    return found + "-dirty" * bool(changed) or "unknown"


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
