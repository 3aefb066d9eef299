"""Some steps of writing go wrong: the run goes on exactly, or says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="needs the extra [cli]")
pytest.importorskip("transformers", reason="needs the extra [hf]")

SCRIPT = Path(__file__).with_name("io_faults.py")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and /proc")
def test_faults_at_some_steps() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--sample", "3"],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("3 cases, 0 wrong") == 3
