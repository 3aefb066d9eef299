"""``dilated-attention demo``: one table, one page, and no process left behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest

from dilated_attention_pytorch.cli.console import CommandError
from dilated_attention_pytorch.cli.demo import (
    METHODS,
    QUICK,
    Job,
    block_lists,
    demo_page,
    run_jobs,
    table_rows,
)
from dilated_attention_pytorch.cli.main import main

ENVIRONMENT = {"processor": "<CPU> & co", "cores": "2", "python": "3", "torch": "2", "date": "d",
               "minutes": "1"}  # fmt: skip


class _Page(HTMLParser):
    """Collects what a page would fetch, its ids and its scripts."""

    def __init__(self, page):
        super().__init__()
        self.fetched, self.ids, self.scripts, self._script = [], [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attrs.get(name)
            if value is not None and not value.startswith("#") and value != "data:,":
                self.fetched.append((tag, value))
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self._script = attrs.get("id", "code") if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


@pytest.mark.slow
def test_the_quick_demo_writes_a_page_with_all_data_and_nothing_to_fetch(tmp_path, capsys):
    assert main(["demo", "--quick", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    content = (tmp_path / "index.html").read_text()
    page = _Page(content)
    assert page.fetched == []
    assert "url(" not in content
    assert "@import" not in content
    assert len(page.ids) == len(set(page.ids))
    for name in re.findall(r'getElementById\("([^"]+)"\)', page.scripts["code"]):
        assert name in page.ids
    data = json.loads(page.scripts["data"])
    assert list(data) == list(METHODS)
    for row in printed["methods"]:
        result = data[row["attention"]]
        assert row["needle_accuracy"] == result["needle"]["accuracy"]
        assert row["text_loss"] == result["text"]["loss"]
        check_result(result)
    sparsities = {row["text_sparsity"] for row in printed["methods"][1:]}
    assert max(sparsities) - min(sparsities) < 1e-6
    assert not list(tmp_path.glob("*.tmp"))


def check_result(result):
    needle, text = result["needle"], result["text"]
    blocks = QUICK.needle.seq_len // QUICK.needle.block_size
    assert len(needle["answers"]) == len(needle["right"]) == blocks
    assert needle["curve"][-1] == [QUICK.needle_steps, needle["accuracy"]]
    assert text["curve"][-1][0] == QUICK.text_steps
    assert len("".join(text["blocks"])) == QUICK.seq_len
    for layers, rows in ((needle["layers"], blocks), (text["layers"], len(text["blocks"]))):
        for head in (head for heads in layers for head in heads):
            assert len(head) == rows
            for number, row in enumerate(head):
                assert row == sorted(set(row))
                assert row[-1] == number


def sample_results():
    return {
        name: {
            "needle": {
                "curve": [[1, 0.5]], "accuracy": 0.5, "sparsity": 0.7, "seconds": 1.0,
                "layers": block_lists([], 1, 2), "answers": [0, 0], "right": [None, True],
            },
            "text": {
                "curve": [[1, 2.0]], "loss": 2.0 + number, "bits": 3.0, "sparsity": 0.7,
                "seconds": 1.0, "layers": block_lists([], 1, 2), "heads": 1, "block_size": 16,
                "blocks": ["</script><script>alert(1)</script>", "$style"], "seen_bytes": 10,
            },
        }
        for number, name in enumerate(METHODS)
    }  # fmt: skip


def test_text_and_hardware_names_cannot_break_the_page():
    results = sample_results()
    content = demo_page(results, table_rows(results), ENVIRONMENT, QUICK)
    page = _Page(content)
    assert content.count("<script") == 2
    assert json.loads(page.scripts["data"]) == results
    assert "&lt;CPU&gt; &amp; co" in content


def test_the_page_says_what_the_numbers_say():
    results = sample_results()
    results["adaptive"]["needle"]["accuracy"] = 0.123
    results["strided"]["needle"]["accuracy"] = 0.9
    content = demo_page(results, table_rows(results), ENVIRONMENT, QUICK)
    assert "answers <b>12.3%</b>" in content
    assert "strided, answers <b>90.0%</b>" in content
    assert "Adaptive attention comes out number 2 of 5" in content


def square(report, number):
    report(0.5, "half")
    return number * number


def fail(report):
    raise ValueError("broken on purpose")


def die(report):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_jobs_return_in_order_and_failures_end_everything():
    events = []
    jobs = [Job(f"job {n}", square, (n,)) for n in range(3)]
    assert run_jobs(jobs, 2, events.append) == [0, 1, 4]
    assert {e.number for e in events if e.words == "half"} == {0, 1, 2}
    with pytest.raises(CommandError, match=r"bad failed:(.|\n)*broken on purpose"):
        run_jobs([Job("bad", fail, ())], 1, events.append)
    with pytest.raises(CommandError, match="exit code -9"):
        run_jobs([Job("killed", die, ())], 1, events.append)


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_and_its_processes(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "dilated_attention_pytorch.cli.main", "demo", "--out", tmp_path],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    try:
        while len(children := _children(process.pid)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
        # As a terminal does: the whole group hears it.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in errors.decode()
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (tmp_path / "index.html").exists()


def _children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return file.read().split()
    except FileNotFoundError:
        pytest.skip("needs /proc")


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file" / "page")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
