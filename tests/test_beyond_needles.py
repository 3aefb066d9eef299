"""The problems beyond needles ask for what is there, and runs of all of them start."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
module: Any = importlib.import_module("beyond_needles")
LOOKUPS = [base for base in module.BASES if isinstance(base, module.Lookup)]


def entries(kind: Any, name: Any, value: Any, of: int) -> dict[int, tuple[int, int]]:
    """Value and block by name, of the tokens of a kind in one sequence."""
    places = (kind == of).nonzero()[:, 0].tolist()
    return {int(name[t]): (int(value[t]), t // module.BLOCK) for t in places}


@pytest.mark.parametrize("problem", LOOKUPS, ids=lambda p: p.name)
def test_every_question_has_its_answer_in_another_block(problem: Any) -> None:
    batch = problem.batch(3, torch.Generator().manual_seed(0))
    asked = batch.answer != -100
    far = 0
    assert bool((batch.kind[asked] == module.QUERY).all())
    assert 0 < int(asked.sum()) <= int((batch.kind == module.QUERY).sum())
    for row in range(3):
        own = (batch.kind[row], batch.name[row], batch.value[row])
        place = own if batch.memory is None else tuple(x[row] for x in batch.memory)
        found = entries(*place, module.ENTRY)
        aliases = entries(*place, module.ALIAS)
        blocks: dict[int, set[int]] = {}
        for t in asked[row].nonzero()[:, 0].tolist():
            name, block = int(own[1][t]), t // module.BLOCK
            stands_in = found[name][1] if name in found else aliases[name][1]
            if name in aliases:
                assert found[aliases[name][0]][1] <= stands_in
                name = aliases[name][0]
                far += 1
            assert found[name][0] == int(batch.answer[row, t])
            blocks.setdefault(block, set()).add(stands_in)
            if batch.memory is None:
                assert stands_in < block if problem.causal else stands_in != block
        if problem.together:
            assert all(len(read) == 1 for read in blocks.values())
    share = far / int(asked.sum())
    assert 0.4 < share < 0.6 if problem.hops == 2 else share == 0


def test_a_copy_from_far_away_gets_the_judged_bytes_right() -> None:
    problem = module.Bytes(name="text", seq_len=256)
    text = torch.randint(97, 123, (1, 257), generator=torch.Generator().manual_seed(1))
    text[0, 200:220] = text[0, 20:40]
    # Too near to count.
    text[0, 80:100] = text[0, 60:80]
    zeros = torch.zeros(1, 256, dtype=torch.long)
    batch = module.Batch(text[:, :-1], zeros, zeros, text[:, 1:])
    # The first byte with eight like ones before it stands at 207, the last answer at 218.
    assert problem.judged(batch)[0].nonzero()[:, 0].tolist() == list(range(207, 219))


def test_quick_runs_keep_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(module.RESULTS.parent.rglob("*"))
    assert module.main(["--quick"]) == 0
    assert "6 of 6 runs" in capsys.readouterr().out
    assert sorted(module.RESULTS.parent.rglob("*")) == before
    (log,) = tmp_path.rglob("runs.jsonl")
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(r["cell"], r["asked"], r["method"]) for r in runs} == {
        (cell, asked, method)
        for cell in ("tracking", "patches")
        for asked, method in ((0.75, "dense"), (0.75, "adaptive"), (0.9, "adaptive"))
    }
    page = (log.parent / "README.md").read_text()
    # Columns without a run are left out.
    assert "| problem | sparsity | dense | adaptive |\n" in page
    assert page.count(", 1 of 5 seeds)") == 4 * 2
