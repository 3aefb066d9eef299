"""Random calls against the oracle: ``python -m guards.random_calls --calls 100000 --seed 0``.

Every call follows from its seed alone, so a range of seeds can be run in parts, on several
processes (``--jobs``) or again: ``--only SEED`` runs one and says what it was. Without
``--device cuda`` a small share of the calls also runs the Triton kernels, interpreted, in a process
of its own (``TRITON_INTERPRET`` is read when they are imported). Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guards.reports import write_report

# Of 100 seeds so many are calls of each kind.
SHARES = {"attention": 82, "decode": 6, "layer": 4, "multihead": 2, "pattern": 4, "misuse": 2}
# Interpreted kernels take a hundred times as long.
INTERPRETED_SHARE = 0.003


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m guards.random_calls")
    parser.add_argument("--calls", type=int, default=1000, help="calls to make, at least")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", type=int, help="run one seed and describe it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", default="all", help="one backend of the op; default: all")
    parser.add_argument("--kind", choices=tuple(SHARES), help="calls of one kind alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the calls")
    parser.add_argument("--json", type=Path, help="write counts and mismatches there")
    return parser.parse_args(arguments)


def kind_of(seed: int) -> str:
    """What a seed stands for."""
    place = seed * 61 % 100
    for kind, share in SHARES.items():
        if place < share:
            return kind
        place -= share
    raise AssertionError("the shares make 100")


def runner(device: str, backend: str) -> Callable[[int, str], tuple[list[Any], str]]:
    """A function that runs one seed as one kind: its outcomes, and what was called."""
    from guards import attention_calls, draws, layer_calls, misuse_calls

    options: dict[str, Any] = {}
    if device == "cuda":
        options = {
            "blocks": draws.GPU_BLOCKS, "longest": 300, "most_pairs": 1_200_000,
            "forms": draws.GPU_FORMS,
        }  # fmt: skip
    elif backend == "triton":
        options = {"blocks": draws.INTERPRETED_BLOCKS, "longest": 70}
    if backend == "triton":
        options["dtypes"] = draws.DTYPES[1:]

    def run(seed: int, kind: str) -> tuple[list[Any], str]:
        if kind == "attention":
            case = draws.draw(seed, **options)
            names = (backend,) if backend != "all" else attention_calls.some_backends(case, device)
            return attention_calls.check(case, names, device), str(case)
        if kind == "decode":
            every = ("gather", "reference", "auto") if device == "cpu" else ("triton", "auto")
            names = (backend,) if backend != "all" else every
            return layer_calls.check_decode(seed, device, names), ""
        room = misuse_calls if kind == "misuse" else layer_calls
        return getattr(room, f"check_{kind}")(seed, device), ""

    return run


def run_seeds(options: argparse.Namespace) -> dict[str, Any]:
    """Runs seeds until enough calls were made; returns counts, refusals and mismatches."""
    run = runner(options.device, options.backend)
    counts: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    seed, start, said = options.seed, time.monotonic(), time.monotonic()
    while counts.total() < options.calls:
        kind = options.kind or kind_of(seed)
        # One backend is a backend of the op or of decoding.
        if options.backend != "all" and kind not in ("attention", "decode"):
            kind = "attention"
        if kind == "decode" and options.backend not in ("all", "gather", "reference", "triton"):
            kind = "attention"
        outcomes, about = run(seed, kind)
        for outcome in outcomes:
            counts[f"{outcome.kind} {outcome.backend}".strip()] += 1
            if outcome.refusal:
                refusals[f"{outcome.backend}: {outcome.refusal}"] += 1
            if outcome.wrong:
                found = {"seed": seed, "kind": kind, "backend": outcome.backend}
                wrong.append({**found, "wrong": outcome.wrong, "about": about})
                where = f"MISMATCH --only {seed} ({kind} {outcome.backend})"
                print(f"{where}: {outcome.wrong}\n    {about}", flush=True)
        seed += 1
        if time.monotonic() - said > 30:
            said = time.monotonic()
            rate = counts.total() / (said - start)
            done = f"{counts.total():,} calls, {rate:.0f}/s, seeds to {seed}"
            print(f"{done}, {len(wrong)} wrong", flush=True)
    return {
        "seeds": [[options.seed, seed - 1]], "calls": counts.total(),
        "seconds": round(time.monotonic() - start, 1), "counts": dict(sorted(counts.items())),
        "refusals": dict(sorted(refusals.items())), "mismatches": wrong,
    }  # fmt: skip


def command_of(options: argparse.Namespace, **changes: Any) -> list[str]:
    """The command line of a process that takes a part."""
    command = [sys.executable, "-m", "guards.random_calls"]
    for name, value in {**vars(options), "jobs": 1, "only": None, **changes}.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    return command


def run_interpreted(options: argparse.Namespace) -> dict[str, Any]:
    """The interpreted share, in a process of its own."""
    calls = max(1, round(options.calls * INTERPRETED_SHARE))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        process = subprocess.Popen(command_of(options, backend="triton", calls=calls, json=path))
        return report_of(process, path, options.seed)


def run_jobs(options: argparse.Namespace) -> dict[str, Any]:
    """Shares the calls among processes, each of them with seeds of its own; adds their reports."""
    calls, start = -(-options.calls // options.jobs), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for job in range(options.jobs):
            # A seed makes one call or more, so that ranges of as many seeds do not meet.
            seed, path = options.seed + job * calls, Path(folder) / f"{job}.json"
            command = command_of(options, calls=calls, seed=seed, json=path)
            processes[seed] = (subprocess.Popen(command), path)
        reports = [report_of(*process, seed) for seed, process in processes.items()]
    merged = reports[0]
    for report in reports[1:]:
        add_report(merged, report)
    merged["seconds"] = round(time.monotonic() - start, 1)
    return merged


def report_of(process: subprocess.Popen[bytes], path: Path, seed: int) -> dict[str, Any]:
    """Waits for a part; what ended without a report is a mismatch."""
    code = process.wait()
    if code in (0, 1) and path.exists():
        written = json.loads(path.read_text())
        names = ("seeds", "calls", "seconds", "counts", "refusals", "mismatches")
        return {name: written[name] for name in names}
    wrong = {"seed": seed, "kind": "process", "backend": "", "about": ""}
    wrong["wrong"] = f"the process that began with this seed ended with {code}"
    print(f"MISMATCH {wrong['wrong']}: {seed}", flush=True)
    return {
        "seeds": [[seed, seed]], "calls": 0, "seconds": 0.0, "counts": {},
        "refusals": {}, "mismatches": [wrong],
    }  # fmt: skip


def add_report(report: dict[str, Any], other: dict[str, Any]) -> None:
    """Adds another report to one, in place."""
    report["calls"] += other["calls"]
    for name in ("counts", "refusals"):
        report[name] = dict(sorted((Counter(report[name]) + Counter(other[name])).items()))
    report["mismatches"] += other["mismatches"]
    # The interpreted kernels take seeds of the same range.
    report["seeds"] += [x for x in other["seeds"] if x[0] != report["seeds"][-1][0]]


def main(arguments: list[str] | None = None) -> int:
    """The command: 1 if anything differs from the oracle."""
    options = parse(arguments)
    # See conftest.py: some machines announce matrix instructions that they do not run.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    if options.device == "cpu" and options.backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
        from interpreted_kernels import hasten_interpreter

        hasten_interpreter()
        # NumPy says so where numbers are not finite, as many here are meant to be.
        warnings.simplefilter("ignore", RuntimeWarning)
    import torch

    torch.set_num_threads(1)
    if options.only is not None:
        kind = options.kind or kind_of(options.only)
        outcomes, about = runner(options.device, options.backend)(options.only, kind)
        print(about)
        for outcome in outcomes:
            found = outcome.wrong or outcome.refusal or "right"
            print(f"{outcome.kind} {outcome.backend}: {found}")
        return int(any(outcome.wrong for outcome in outcomes))
    if options.jobs > 1:
        report = run_jobs(options)
    else:
        report = run_seeds(options)
        if options.device == "cpu" and options.backend == "all" and options.kind is None:
            add_report(report, run_interpreted(options))
    cases, wrong = report["calls"], len(report["mismatches"])
    write_report(options.json, cases, wrong, gpu=options.device == "cuda", **report)
    for title in ("counts", "refusals"):
        numbers = [f"{name} {number:,}" for name, number in report[title].items()]
        print(f"{title}: {', '.join(numbers)}")
    seeds = "seeds " + ", ".join(f"{first} to {last}" for first, last in report["seeds"])
    print(f"{report['calls']:,} calls of {seeds} in {report['seconds']} s: {wrong} mismatches")
    return int(bool(report["mismatches"]))


if __name__ == "__main__":
    sys.exit(main())
