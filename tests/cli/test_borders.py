"""Commands and what they cannot trust: names, folders of others, odd files, a second writer."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="needs the extra [cli]")

from dilated_attention_pytorch.cli.console import PlainConsole, ProgressBar, words_column
from dilated_attention_pytorch.cli.main import main
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.train.run_folder import lock_folder

TEXT = "Each word of this sentence is as good as any other word of it. " * 200
SMALL = [
    "--dim", "16", "--heads", "2", "--layers", "1", "--seq-len", "128", "--batch-size", "1",
    "--steps", "4", "--block-size", "16", "--log-every", "1", "--checkpoint-every", "2",
    "--validate-every", "2", "--validation-sequences", "1", "--threads", "1",
]  # fmt: skip


def train(text: Path, out: Path, *options: str) -> Path:
    text.write_text(TEXT)
    assert main(["train", "--text", str(text), "--out", str(out), *SMALL, *options]) == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    return train(folder / "text.txt", folder / "run")


def one_line(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The error of a command that fails: one line, without control characters."""
    assert main([str(x) for x in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("dilated-attention")]
    assert len(errors) == 1
    assert errors[0] == lines[-1]
    assert errors[0].isprintable()
    return errors[0]


@pytest.mark.parametrize("command", ["train", "resume", "demo", "distill", "tune"])
def test_a_folder_in_use_is_refused(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = (out / "metrics.jsonl").read_bytes()
    line = {
        "train": ["train", "--text", run.parent / "text.txt", *SMALL],
        "resume": ["train", "--resume"],
        "demo": ["demo", "--quick"],
        "distill": ["distill", "--resume"],
        "tune": ["tune", "--model", run, "--text", run.parent / "text.txt"],
    }[command]
    with lock_folder(out):
        error = one_line(capsys, 1, *line, "--out", out)
    assert f"another command writes into {out}" in error
    assert "choose another --out" in error
    assert (out / "metrics.jsonl").read_bytes() == before
    # What only reads is not kept out.
    with lock_folder(out):
        assert main(["report", str(out), "--samples", "1", "--out", str(tmp_path / "p.html")]) == 0


def test_a_command_that_is_refused_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_line(capsys, 1, "train", "--resume", "--out", tmp_path / "a" / "b")
    one_line(capsys, 2, "train", "--dim", "33", "--out", tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    assert "cannot write to" in one_line(capsys, 1, "train", "--out", tmp_path / "file")
    assert "cannot write to" in one_line(capsys, 1, "demo", "--out", tmp_path / "file" / "x")
    for name in ("a\0b", "a\ud800", "x" * 300):
        assert "cannot write to" in one_line(capsys, 1, "train", "--out", tmp_path / name)


def tampered(run: Path, folder: Path, secret: Path) -> Path:
    """A run as somebody may send it: it says that it learnt from a file of yours."""
    out = folder / "sent"
    shutil.copytree(run, out)
    for path in (out / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)
        state["loop"]["text"]["paths"] = [str(secret)]
        torch.save(state, path)
    return out


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened."""
    names: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and noting:
            names.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")

    noting = [1]
    sys.addaudithook(note)
    yield names
    noting.clear()


def test_a_run_of_others_does_not_say_which_files_are_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    secret, page = tmp_path / "secret.txt", tmp_path / "page.html"
    secret.write_text("The password is swordfish. " * 400)
    sent = tampered(run, tmp_path, secret)
    opened.clear()
    for command in (["report", sent, "--out", page], ["diagnose", sent],
                    ["train", "--resume", "--out", sent]):  # fmt: skip
        error = one_line(capsys, 1, *command)
        assert f"{sent} was not made by this account" in error
        assert "--text" in error
    assert str(secret) not in opened
    assert not page.exists()
    # Named on the command line, it is the user who chooses.
    text = tmp_path / "mine.txt"
    text.write_text(TEXT)
    assert main(["report", str(sent), "--text", str(text), "--out", str(page)]) == 0
    assert "swordfish" not in page.read_text()
    assert str(secret) not in opened
    assert str(text) in opened


def test_ones_own_run_needs_no_names_where_it_lies_or_was_moved(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    page = tmp_path / "page.html"
    assert main(["report", str(moved), "--out", str(page), "--samples", "1"]) == 0
    assert main(["train", "--resume", "--out", str(moved)]) == 0
    capsys.readouterr()
    # On another machine the key is another one; then the text is named.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    assert "--text" in one_line(capsys, 1, "train", "--resume", "--out", moved)
    text = ["--text", str(run.parent / "text.txt")]
    assert main(["train", "--resume", "--out", str(moved), *text]) == 0
    other = ["--text", str(tmp_path / "other.txt")]
    assert "other settings" in one_line(capsys, 2, "train", "--resume", "--out", moved, *other)


def test_a_text_that_has_changed_is_not_shown_as_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path / "text.txt", tmp_path / "run")
    (tmp_path / "text.txt").write_text("Something else by now. " * 900)
    error = one_line(capsys, 1, "report", out, "--out", tmp_path / "page.html")
    assert "has changed since" in error
    assert "--text FILE" in error


NAMES = [
    b"[/red] [bold]x[/] \x1b[31mred\x1b]0;t\x07", b"two\nlines\tand\rmore",
    b"caf\xe9 " + "right\u202etfel\u2066".encode(), b"<script>alert(1)</script> $x^$ %s {0}",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_shown_as_it_is(
    name: bytes, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir(parents=True)
    out = folder / "run"
    shutil.copytree(run, out)
    text, page = folder / "text.txt", folder / "page.html"
    text.write_text(TEXT)
    command = ["train", "--text", text, *SMALL, "--steps", "1", "--out", folder / "new"]
    assert main([str(x) for x in command]) == 0
    assert main(["report", str(out), "--text", str(text), "--out", str(page)]) == 0
    shown = capsys.readouterr()
    for words in (shown.out, shown.err):
        assert all(c.isprintable() or c == "\n" for c in words)
    assert f"Open {printable(page.resolve())} in a browser." in shown.out
    assert f"parameters, on {printable(text)}: " in shown.err
    content = page.read_bytes().decode("utf-8")
    assert "<script>alert" not in content
    assert "\x1b" not in content
    one_line(capsys, 1, "report", folder / "none", "--out", page)
    one_line(capsys, 1, "train", "--text", folder / "none", "--out", folder / "a")
    with pytest.raises(SystemExit):
        main(["train", str(folder)])
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().err)


def test_a_file_of_any_name_is_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"a\nb", "日本語".encode()):
        (folder / os.fsdecode(name)).write_text(TEXT)
    command = ["train", "--text", str(folder), *SMALL, "--out", str(tmp_path / "run")]
    assert main(command) == 0


def test_strings_are_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    console = PlainConsole(stderr=True, force_terminal=True)
    words = "[red]a[/red] [/x] :smile: \x1b[31m\u202e"
    table = Table(title=words)
    table.add_column(words)
    table.add_row(words)
    console.print(words)
    console.print(table)
    with ProgressBar(words_column("{task.description} {task.fields[state]}"), console=console) as b:
        task = b.add_task(words, total=2, state="")
        b.update(task, description=words, state=words, completed=1)
        b.console.print(words)
    shown = capsys.readouterr().err
    assert shown.count("[red]a[/red] [/x] :smile: \\x1b[31m\\u202e") >= 4
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown


def test_a_terminal_with_few_letters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "shown", "w", encoding="ascii") as file:
        PlainConsole(file=file).print("Käse 日本語 \udce9")
    assert (tmp_path / "shown").read_text() == "K\\xe4se \\u65e5\\u672c\\u8a9e \\xe9\n"


def test_odd_lines_of_metrics_are_left_out_with_a_note(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(run, out)
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    odd = [
        b"\xff\xfe\n", b"[1]\n", b'{"step": 1, "loss": "x"}\n', b'{"step": 1, "loss": NaN}\n',
        b'{"step": 2, "layer_sparsity": [0.1, 0.2, 0.3]}\n', b'{"step": 2, "recall_x": 0.5}\n',
        b'{"step": 2, "temperature": [1]}\n', b"[" * 50_000 + b"\n",
    ]  # fmt: skip
    cut = lines[-1][:-9]
    (out / "metrics.jsonl").write_bytes(b"".join([*odd, *lines[:-1], cut]))
    text = ["--text", str(run.parent / "text.txt"), "--samples", "2"]
    assert main(["report", str(out), *text, "--out", str(page)]) == 0
    note = capsys.readouterr().err
    assert "7 lines, 1 the first, of" in note
    assert "cannot be read and is left out" in note
    data = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    losses = next(c for c in data["charts"] if "training batches" in c["title"])
    assert [step for step, _ in losses["series"]["loss"]] == [1, 2, 3]
    assert main(["diagnose", str(out), *text]) in (0, 1)
    assert "left out" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out), "--json"]) == 0


def test_a_disk_that_is_full_at_the_end_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    page = tmp_path / "page.html"
    page.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    command = ["report", run, "--samples", "1", "--out", page]
    assert "No space left on device" in one_line(capsys, 1, *command)
    assert page.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("clock", [lambda: 5.0, lambda: -time.process_time()])
def test_a_clock_that_stands_still_or_goes_back(
    clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, name, clock)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["train", "--text", str(text), "--out", str(tmp_path / "run"), *SMALL]
    assert main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["tokens_per_second"] is None
    assert summary["seconds"] == 0
    assert summary["finished"]


def test_threads_are_kept_out_as_processes_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, held, done = tmp_path / "run", threading.Event(), threading.Event()
    shutil.copytree(run, out)

    def hold() -> None:
        with lock_folder(out):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        held.wait()
        assert "another command" in one_line(capsys, 1, "train", "--resume", "--out", out)
    finally:
        done.set()
        thread.join()
    assert main(["train", "--resume", "--out", str(out)]) == 0


def test_of_two_threads_that_train_at_once_one_writes(run: Path, tmp_path: Path) -> None:
    text, out = run.parent / "text.txt", tmp_path / "run"
    command = ["train", "--text", str(text), "--out", str(out), *SMALL, "--steps", "12"]
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(main(command))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes)[0] == 0
    assert sorted(codes)[1] in (1, 2)
    steps = [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(13))
