"""Every default stands in docs/defaults.md with its value and a committed run."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from dilated_attention_pytorch import AdaptiveConfig, AdaptiveSparsityTrainer
from dilated_attention_pytorch.train.language_model import LanguageModelRun

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "defaults.md").read_text()
RESULTS = ROOT / "experiments" / "results"
# No settings of what is learned, but of where and how often; and what nobody can guess.
ELSEWHERE = {
    "config", "segment_lengths", "dilation_rates", "seed", "threads", "device", "annealing_steps",
}  # fmt: skip


def fields(kind: Any) -> dict[str, Any]:
    made = kind()
    return {f.name: getattr(made, f.name) for f in dataclasses.fields(kind)}


def arguments(kind: Any) -> dict[str, Any]:
    given = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in given if p.name != "model"}


def rows(heading: str) -> dict[str, tuple[str, str]]:
    section = PAGE.split(heading)[1].split("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*?) \|", section, flags=re.M)
    return {name: (value, run) for name, value, run in found}


def check(heading: str, defaults: dict[str, Any]) -> None:
    stated = rows(heading)
    assert set(stated) == set(defaults) - ELSEWHERE
    for name, (value, run) in stated.items():
        assert value == repr(defaults[name]), name
        folder = RESULTS / run.strip("`")
        assert any(folder.iterdir()), f"{name}: {folder}"


@pytest.mark.parametrize(
    ("heading", "defaults"),
    [
        ("## A layer", fields(AdaptiveConfig)),
        ("## The trainer", arguments(AdaptiveSparsityTrainer)),
        ("## `dilated-attention train`", fields(LanguageModelRun)),
    ],
    ids=["layer", "trainer", "train"],
)
def test_every_default_has_its_evidence(heading: str, defaults: dict[str, Any]) -> None:
    check(heading, defaults)


def test_every_default_of_pretrained_runs_has_its_evidence() -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from dilated_attention_pytorch.hf.train_selectors import FitRun, PretrainedRun, TuneRun

    check("## Pretrained models", fields(FitRun))
    shared = {f.name for f in dataclasses.fields(PretrainedRun)}
    own = {name: value for name, value in fields(TuneRun).items() if name not in shared}
    check("## `tune` alone", own)


def test_every_default_of_allot_has_its_evidence() -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from dilated_attention_pytorch.hf.layer_shares import AllotJob

    every = {f.name: f.default for f in dataclasses.fields(AllotJob)}
    given = {k: value for k, value in every.items() if value is not dataclasses.MISSING}
    check("## `allot`", given)


def test_every_default_of_evaluate_has_its_evidence() -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from dilated_attention_pytorch.hf.evaluate import EvaluationSettings

    check("## `evaluate`", fields(EvaluationSettings))
