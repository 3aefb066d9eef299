"""Every experiment runs in its quick mode, keeps nothing, and is on the index page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
NAMES = sorted(
    path.stem for path in EXPERIMENTS.glob("*.py") if "EXPERIMENT = Experiment(" in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_quick_mode(name: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, EXPERIMENTS / f"{name}.py", "--quick"],
        capture_output=True, text=True, check=False, timeout=300,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.glob(f"{name}-*")
    page = (folder / "README.md").read_text()
    assert "**Promise.**" in page
    assert "**Finding.**" in page
    assert "nan" not in page
    assert (folder / "plot.png").stat().st_size > 1000


def test_the_index_page_is_what_the_results_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import index

    assert sorted(index.NAMES) == NAMES
    monkeypatch.setattr(index, "PICTURES", tmp_path)
    assert index.PAGE.read_text() == index.render()
