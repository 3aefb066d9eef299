"""No damage of a file is read silently, takes long, fills the memory or gives an odd error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guards.file_damage import GROUPS, Kind, one_thread, run_kind

pytest.importorskip("safetensors")
pytest.importorskip("transformers", reason="needs the extra [hf]")


def _kinds() -> list[Kind]:
    with one_thread():
        return [kind for group in GROUPS.values() for kind in group()]


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def kinds() -> dict[str, Kind]:
    return {kind.name: kind for kind in _kinds()}


NAMES = [
    "pattern", "forged pattern", "distilled patterns", "forged distilled patterns",
    "adapter settings", "adapter weights", "forged adapter settings", "forged adapter weights",
    "checkpoint", "forged checkpoint", "folder settings", "folder weights", "folder digests",
    "costs", "forged costs", "settings", "metrics",
]  # fmt: skip


def test_every_kind_is_here(kinds: dict[str, Kind]) -> None:
    assert list(kinds) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_an_error_or_harmless(name: str, kinds: dict[str, Kind], tmp_path: Path) -> None:
    # Each one of these takes a step of a training.
    count = 25 if name == "forged checkpoint" else 120
    out = run_kind(kinds[name], count, seed=1, place=tmp_path)
    assert not out.mistakes
    # A reader that takes everything, or nothing, would pass above.
    assert out.refused > 0 or name == "metrics"
    assert out.harmless > 0 or not kinds[name].forged


@pytest.mark.parametrize("what", ["nothing", "folder", "pipe", "loop", "empty", "denied"])
@pytest.mark.parametrize(
    "name", ["pattern", "distilled patterns", "adapter settings", "adapter weights", "checkpoint"]
)
def test_what_is_no_file_is_refused_at_once(
    name: str, what: str, kinds: dict[str, Kind], tmp_path: Path
) -> None:
    kind = kinds[name]
    for own, content in kind.files.items():
        (tmp_path / own).write_bytes(content)
    path = tmp_path / kind.target
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no pipes here")
        # Whoever opens it to read waits for a writer.
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "denied":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        path.write_bytes(kind.files[kind.target])
        path.chmod(0)
    with pytest.raises((*kind.errors, FileNotFoundError), match=tmp_path.name):
        kind.read(tmp_path)


def test_the_guard_sees_a_reader_that_takes_damage(tmp_path: Path) -> None:
    """A file without a digest, read by its bytes alone."""
    kind = Kind(
        "bytes", {"x": bytes(range(64))}, "x", lambda folder: list((folder / "x").read_bytes()),
        (ValueError,), lambda rng, content: content[:-1] + bytes([rng.randrange(200)]),
    )  # fmt: skip
    out = run_kind(kind, 3, seed=0, place=tmp_path)
    assert len(out.mistakes) == 3
    assert "other values" in out.mistakes[0]

    def fail(folder: Path) -> list[int]:
        content = (folder / "x").read_bytes()
        return [{63: 1}[content[-1]]]

    out = run_kind(replace(kind, name="odd", read=fail), 3, seed=0, place=tmp_path)
    assert [mistake.split(": ")[1] for mistake in out.mistakes] == ["KeyError"] * 3
