"""The examples of the documentation run as written, its commands parse, its pictures are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch.cli.main import _parser

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
README = DOCS.parent / "README.md"


@pytest.mark.parametrize(
    "page", [p for p in [*PAGES, README] if EXAMPLE.search(p.read_text())], ids=lambda p: p.stem
)
def test_examples_run_one_after_another(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for number, code in enumerate(EXAMPLE.findall(page.read_text())):
        exec(compile(code, f"{page.name}, example {number + 1}", "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda p: p.stem)
def test_commands_parse(page: Path) -> None:
    for line in re.findall(r"^dilated-attention (.*)$", page.read_text(), re.MULTILINE):
        _parser().parse_args(shlex.split(line, comments=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pictures_are_there(page: Path) -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page.read_text()):
        assert (DOCS / name).is_file(), name


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f": {page.name}" in navigation
