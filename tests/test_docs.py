"""The documentation's examples run as written, its commands parse, its pictures are there.

On the pages about pretrained models the commands run as well, on a tiny model and with fewer steps.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch.cli.main import _parser, main
from tiny_models import save_tiny

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
README = DOCS.parent / "README.md"
# Their commands and examples build on each other and on a folder "my-model".
WITH_A_MODEL = (DOCS / "convert.md", README)
STEP = re.compile(r"^```(python)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
FITTED = "--seq-len 256 --block-size 16 --base-sparsity 0.6"
SMALLER = {
    "distill": FITTED,
    "tune": f"--steps 2 {FITTED}",
    "allot": "--lengths 256 --windows 1",
    "evaluate": "--lengths 256 --sparsities 0.6 --windows 1 --calibration-windows 1 --repeats 0 "
    "--baselines mean_pool",
    "evaluate --suite speed": "--lengths 64 --repeats 1",
    "evaluate --suite retrieval": "--lengths 256 --sparsities 0.6 --windows 1 --samples 1 "
    "--calibration-windows 1 --tasks needle --baselines mean_pool",
    "report": "--samples 1",
    "diagnose": "--samples 2",
}


@pytest.mark.parametrize(
    "page",
    [p for p in [*PAGES, README] if EXAMPLE.search(p.read_text()) and p not in WITH_A_MODEL],
    ids=lambda p: p.stem,
)
def test_examples_run_one_after_another(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for number, code in enumerate(EXAMPLE.findall(page.read_text())):
        exec(compile(code, f"{page.name}, example {number + 1}", "exec"), names)


def commands(text: str) -> list[str]:
    """What follows the program's name, with lines that go on joined."""
    joined = text.replace("\\\n", "")
    return re.findall(r"^dilated-attention (.*)$", joined, re.MULTILINE)


@pytest.mark.parametrize("page", WITH_A_MODEL, ids=lambda p: p.stem)
def test_the_way_from_a_model_folder(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("rich", "transformers", "peft"):
        pytest.importorskip(package, reason="needs the extras [cli,hf,peft]")
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "my-model")
    (tmp_path / "texts").mkdir()
    for name in ("texts/a.txt", "texts/b.txt", "book.txt"):
        lines = "".join(f"line {n} of {name}, as every line here.\n" for n in range(120))
        (tmp_path / name).write_text(lines)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for number, (python, code) in enumerate(STEP.findall(page.read_text())):
        if python:
            exec(compile(code, f"{page.name}, block {number + 1}", "exec"), names)
        for line in commands("" if python else code):
            command, *arguments = shlex.split(line)
            suite = " ".join([command, *arguments[:2]])
            smaller = SMALLER[suite if suite in SMALLER else command]
            status = main([command, *arguments, *smaller.split()])
            # A selector that was taught for two steps may fail its diagnosis.
            assert status == 0 or command == "diagnose", capsys.readouterr().err
    assert (tmp_path / "runs/tune/lora").is_dir()
    assert names


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda p: p.stem)
def test_commands_parse(page: Path) -> None:
    for line in commands(page.read_text()):
        _parser().parse_args(shlex.split(line, comments=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pictures_are_there(page: Path) -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page.read_text()):
        assert (DOCS / name).is_file(), name


def anchors(page: Path) -> set[str]:
    """The names that links to the headings of a page have, here and on the site."""
    heads = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_pages_outside_the_site(name: str) -> None:
    page = DOCS.parent / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            target, _, anchor = link.partition("#")
            assert (page.parent / target).is_file(), link
            assert not anchor or anchor in anchors(page.parent / target), link


def test_every_entry_of_the_log_has_a_date_and_a_verdict_and_is_in_its_index() -> None:
    page = (DOCS / "log.md").read_text()
    verdict = "kept|refuted|dropped|open|fixed"
    heading = re.compile(rf"## (.+) \((\d{{4}}-\d\d-\d\d), ({verdict})\)")
    entries = []
    for line in re.findall(r"^##.*", page, re.MULTILINE):
        match = heading.fullmatch(line)
        assert match, line
        title, day, kind = match.groups()
        entries.append((day, kind, title))
    rows = re.findall(
        rf"^\| (\S+) \| .+ \| ({verdict}) \| \[(.+)\]\(#(.+)\) \|$", page, re.MULTILINE
    )
    assert [row[:3] for row in rows] == entries
    assert {row[3] for row in rows} <= anchors(DOCS / "log.md")
    assert len({row[3] for row in rows}) == len(rows)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f": {page.name}" in navigation


def test_documentation_imports_from_package_roots() -> None:
    """Where a name lies inside a package is nobody's business; callbacks need another package."""
    roots = "hf|train|analysis|train.hf_trainer|train.lightning".replace(".", r"\.")
    for page in (*PAGES, README, DOCS.parent / "CONTRIBUTING.md"):
        for code in EXAMPLE.findall(page.read_text()):
            deep = re.findall(r"from dilated_attention_pytorch\.(\S+) import", code)
            assert all(re.fullmatch(roots, name) for name in deep), (page.name, deep)
