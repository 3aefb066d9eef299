"""Faults at every step of writing: train, distill and tune go on exactly, or say what is wrong.

A tiny run is done once as it should be. Then it is done again and again, and each time one step of
its input and output goes wrong: a file that is opened for writing, a write, a flush, a rename, a
removal, a folder that is made. What goes wrong is a disk that is full from then on (``full``), an
error of the device (``device``), missing permission (``refused``), or the end of the process in the
middle of the step (``kill``). Whatever it is, the command must end with its code and one line, and
``--resume`` (or the command itself, where no checkpoint was written yet) must give bit for bit what
the undisturbed run gave, without leaving a file behind.

    python tests/guards/io_faults.py                   # some steps of each command
    python tests/guards/io_faults.py --all             # every step, every fault
    python tests/guards/io_faults.py --kills 200       # SIGKILL at random moments

Every run is a process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

FAULTS = ("full", "device", "refused", "kill")
COMMANDS = ("train", "distill", "tune")
_ERRORS = {"full": errno.ENOSPC, "device": errno.EIO, "refused": errno.EACCES}
# What needs no room on a disk that is full.
_FREE = ("fsync", "unlink", "rmdir", "replace")


class Faults:
    """Counts the steps that write below a folder, and lets one of them go wrong.

    Args:
        folder: Steps elsewhere do not count.
        at: Number of the step, from 0. None: all go well.
        fault: A name of ``FAULTS``.
    """

    def __init__(self, folder: Path, at: int | None = None, fault: str = "device") -> None:
        self.folder, self.at, self.fault = str(folder.resolve()), at, fault
        self.steps: list[str] = []

    def step(self, name: str, path: Any, before: Callable[[], None] = lambda: None) -> None:
        """A step that writes; ``before`` does a part of it, in case it breaks off."""
        place = os.fsdecode(path) if not isinstance(path, int) else _path_of(path)
        if place != self.folder and not place.startswith(self.folder + os.sep):
            return
        number = len(self.steps)
        self.steps.append(name)
        if self.at is None or number < self.at or (number > self.at and self.fault != "full"):
            return
        if self.fault == "full" and name in _FREE:
            return
        before()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = _ERRORS[self.fault]
        raise OSError(code, os.strerror(code), place)

    @contextmanager
    def injected(self) -> Iterator[None]:
        """While open, the functions of the system count and fail."""
        kept = {name: getattr(os, name) for name in ("open", "fsync", "replace", "unlink", "mkdir",
                                                     "rmdir")}  # fmt: skip
        kept_open = builtins.open

        def os_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.step("open", path)
            return kept["open"](path, flags, *rest, **options)

        def plain(name: str) -> Callable[..., Any]:
            def call(path: Any, *rest: Any, **options: Any) -> Any:
                self.step(name, path)
                return kept[name](path, *rest, **options)

            return call

        def file_open(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            writing = any(letter in mode for letter in "wax+")
            if writing and not isinstance(file, int):
                self.step("open", file)
            opened = kept_open(file, mode, *rest, **options)
            return _File(opened, self) if writing else opened

        for name in kept:
            setattr(os, name, os_open if name == "open" else plain(name))
        builtins.open = io.open = file_open  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(os, name, function)
            builtins.open = io.open = kept_open


class _File:
    """A file whose writes are steps; one that breaks off has written half."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, content: Any) -> int:
        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._faults.step("write", self._file.fileno(), half)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def arguments(command: str, place: Path) -> list[str]:
    """The command line of a tiny run, without ``--out``."""
    text = ["--text", str(place / "text.txt")]
    every = ["--log-every", "1", "--validate-every", "2", "--checkpoint-every", "2"]
    if command == "train":
        return [
            "train", *text, *every, "--dim", "16", "--heads", "2", "--layers", "1", "--seq-len",
            "64", "--batch-size", "1", "--steps", "3", "--block-size", "16", "--threads", "1",
            "--validation-sequences", "1",
        ]  # fmt: skip
    shared = [
        "--model", str(place / "model"), *text, "--seq-len", "64", "--block-size", "16",
        "--base-sparsity", "0.5", "--validation-windows", "1",
    ]  # fmt: skip
    if command == "distill":
        return ["distill", *shared, "--windows", "3"]
    shared += [*every, "--steps", "3"]
    adapter = place / "distill-whole" / "adapter"
    return ["tune", *shared, "--train", "all", "--adapter", str(adapter)]


def prepare(place: Path, commands: tuple[str, ...]) -> None:
    """Text and model of the runs; imports everything, but trains nothing.

    A process that has had a backward pass must not be forked.
    """
    words = "".join(f"line {n} of the text, {n * n % 17} times as good.\n" for n in range(90))
    (place / "text.txt").write_text(words)
    from dilated_attention_pytorch.cli import main

    main._parser()
    if commands == ("train",):
        return
    from dilated_attention_pytorch.hf import model_folder
    from tiny_models import save_tiny

    save_tiny(place / "model")
    model_folder.quieten()
    model_folder.load_model(place / "model")
    model_folder.load_tokenizer(place / "model")
    for name in ("matplotlib.backends.backend_agg", "PIL.PngImagePlugin"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)


def start(command: list[str], faults: Faults | None, log: Path) -> int:
    """Starts a command in a process of its own; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        with kept_output(log):
            from dilated_attention_pytorch.cli.main import main

            if faults is None:
                code = main(command)
            else:
                with faults.injected():
                    code = main(command)
                log.with_suffix(".steps").write_text(" ".join(faults.steps))
    except BaseException:
        with builtins.open(log, "a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """The exit code of a process, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(command: list[str], faults: Faults | None, log: Path) -> int:
    """A command in a process of its own; returns its exit code."""
    return finish(start(command, faults, log))


@contextmanager
def kept_output(log: Path) -> Iterator[None]:
    """What is printed goes to a file."""
    with builtins.open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
        sys.stdout.flush()
        sys.stderr.flush()


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on faults: state, metrics and results, without times."""
    from dilated_attention_pytorch.train.checkpoint import list_checkpoints, load_checkpoint

    state = load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    state["training"].pop("seconds")
    state.pop("loss_seconds")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second")
    return {
        # A checkpoint that could not be removed harms nobody.
        "files": sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".pt"
        ),
        "state": digest(state),
        "metrics": [{k: v for k, v in line.items() if k not in timed} for line in lines],
        "results": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.safetensors"))
        },
    }


def digest(value: Any) -> Any:
    """Plain values that are the same for the same bits."""
    import torch

    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]
    if isinstance(value, dict):
        return {str(key): digest(item) for key, item in value.items()}
    return [digest(item) for item in value] if isinstance(value, list | tuple) else value


class Trial:
    """A command, its undisturbed result, and what faults make of it.

    Args:
        command: A name of ``COMMANDS``.
        place: A folder that :func:`prepare` has filled.
    """

    def __init__(self, command: str, place: Path) -> None:
        self.command, self.place = command, place
        self.line = arguments(command, place)
        self.log = place / f"{command}.log"
        whole = place / f"{command}-whole"
        faults = Faults(whole)
        start = time.monotonic()
        code = run([*self.line, "--out", str(whole)], faults, self.log)
        self.seconds = time.monotonic() - start
        if code:
            raise RuntimeError(f"{command} ended with {code}: {self.log.read_text()}")
        self.steps = self.log.with_suffix(".steps").read_text().split()
        self.whole = outcome(whole)

    def disturbed(self, number: int, fault: str) -> str | None:
        """What is wrong after a fault at a step; None: nothing."""
        folder = self.place / f"{self.command}-{number}-{fault}"
        code = run([*self.line, "--out", str(folder)], Faults(folder, number, fault), self.log)
        words = self.log.read_text()
        if fault == "kill":
            expected = code == -signal.SIGKILL
        else:
            # A step of tidying up may fail and harm nothing.
            says = [line for line in words.splitlines() if line.startswith("dilated-attention")]
            expected = code == len(says) in (0, 1) and "Traceback" not in words
        if not expected:
            return f"ended with {code}: {words[-1500:]}"
        return self.finished(folder)

    def killed(self, chance: random.Random) -> str | None:
        """What is wrong after SIGKILL at a random moment, and at another one while it goes on."""
        folder = self.place / f"{self.command}-killed"
        out = ["--out", str(folder)]
        for command in ([*self.line, *out], [self.command, "--resume", *out]):
            pid = start(command, None, self.log)
            time.sleep(chance.uniform(0, self.seconds))
            os.kill(pid, signal.SIGKILL)
            finish(pid)
        return self.finished(folder)

    def finished(self, folder: Path) -> str | None:
        """Goes on with what is there; says what differs from the undisturbed run."""
        out = ["--out", str(folder)]
        code = run([self.command, "--resume", *out], None, self.log)
        words = self.log.read_text()
        if code == 1 and "nothing to resume" in words:
            code = run([*self.line, *out], None, self.log)
            words = self.log.read_text()
        if code:
            return f"going on ended with {code}: {words[-1500:]}"
        found = outcome(folder)
        shutil.rmtree(folder)
        different = [name for name in found if found[name] != self.whole[name]]
        if not different:
            return None
        return f"{different[0]} differ: {found[different[0]]} for {self.whole[different[0]]}"


def main() -> int:
    """Runs what the command line asks for; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--all", action="store_true", help="every step with every fault")
    parser.add_argument("--sample", type=int, default=8, help="cases per command without --all")
    parser.add_argument("--kills", type=int, default=0, help="random kills instead, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    wrong, parts = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        # The key that marks runs as one's own.
        os.environ["XDG_STATE_HOME"] = str(place / "state")
        commands = tuple(options.commands)
        prepare(place, commands)
        if "tune" in commands and "distill" not in commands:
            Trial("distill", place)
        for command in sorted(commands):
            trial = Trial(command, place)
            chance = random.Random(f"{options.seed} {command}")
            if options.kills:
                count = options.kills // len(commands)
                bad = [words for _ in range(count) if (words := trial.killed(chance))]
            else:
                cases = [(n, fault) for n in range(len(trial.steps)) for fault in options.faults]
                if not options.all:
                    cases = chance.sample(cases, min(options.sample, len(cases)))
                count = len(cases)
                bad = [
                    f"{fault} at step {n}, {trial.steps[n]}: {words}"
                    for n, fault in cases
                    if (words := trial.disturbed(n, fault))
                ]
            for words in bad:
                print(f"{command}: {words}")
            print(
                f"{command}: {len(trial.steps)} steps, {count} cases, {len(bad)} wrong", flush=True
            )
            wrong += len(bad)
            parts[command] = {"steps": len(trial.steps), "cases": count, "wrong": bad}
    cases = sum(part["cases"] for part in parts.values())
    from guards.reports import write_report

    write_report(options.json, cases, wrong, commands=parts)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
