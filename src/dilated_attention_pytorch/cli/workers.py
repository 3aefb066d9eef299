"""Runs independent jobs in a few processes, with progress, and ends them all together."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any

from dilated_attention_pytorch.cli.console import CommandError

# Tells how far a job is: share done in [0, 1], and a few words.
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Job:
    """One piece of work, under the name that the user sees."""

    name: str
    # Called as function(report, *arguments); importable by name, as the result is.
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    # Expected share of the whole, for the progress.
    weight: float = 1.0


@dataclass(frozen=True)
class Event:
    """News of a job: its number, the share done, words, and the result once there is one."""

    number: int
    share: float
    words: str
    result: Any = None
    error: str | None = None


def run_jobs(jobs: Sequence[Job], processes: int, on_event: Callable[[Event], None]) -> list[Any]:
    """Runs all jobs, some ``processes`` at once, and returns their results in order.

    Raises:
        CommandError: If a job fails or its process dies.
    """
    context = multiprocessing.get_context("spawn")
    numbers: Queue[int | None] = context.Queue()
    events: Queue[Event] = context.Queue()
    for number in [*range(len(jobs)), *[None] * processes]:
        numbers.put(number)
    workers = [
        context.Process(target=_work, args=(list(jobs), numbers, events), daemon=True)
        for _ in range(processes)
    ]
    results: dict[int, Any] = {}
    try:
        with _ctrl_c_held_back():
            for worker in workers:
                worker.start()
        while len(results) < len(jobs):
            try:
                event = events.get(timeout=0.5)
            except queue.Empty:
                _check_alive(workers)
                continue
            if event.error is not None:
                raise CommandError(f"{jobs[event.number].name} failed: {event.error}")
            if event.result is not None:
                results[event.number] = event.result
            on_event(event)
    finally:
        started = [worker for worker in workers if worker.pid is not None]
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.join()
        for channel in (numbers, events):
            channel.cancel_join_thread()
            channel.close()
    return [results[number] for number in range(len(jobs))]


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Delivers a Ctrl-C afterwards; processes started meanwhile never see one.

    A process that is still importing cannot have told the system yet that it ignores Ctrl-C, and
    one that is half started when its parent is interrupted would be left behind.
    """
    heard: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    # Blocking alone is not enough: the system hands the signal to any other thread of this process.
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number)) if main else None
    blocks = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if blocks else set()
    try:
        yield
    finally:
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
    if heard:
        signal.raise_signal(signal.SIGINT)


def _check_alive(workers: Sequence[Any]) -> None:
    for worker in workers:
        if worker.exitcode not in (None, 0):
            raise CommandError(
                f"a training process ended with exit code {worker.exitcode}; if that is -9, the "
                "machine has probably run out of memory."
            )


def _work(jobs: list[Job], numbers: Queue[int | None], events: Queue[Event]) -> None:
    # Ctrl-C reaches the whole group; the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    while (number := numbers.get()) is not None:
        job, index = jobs[number], number

        def report(share: float, words: str, index: int = index) -> None:
            if parent is not None and not parent.is_alive():
                os._exit(1)
            events.put(Event(index, share, words))

        try:
            result = job.function(report, *job.arguments)
            events.put(Event(number, 1.0, "done", result=result))
        except Exception as error:  # whatever it was, the parent shows it
            words = " ".join("".join(traceback.format_exception_only(error)).split())
            events.put(Event(number, 0.0, "failed", error=words))
            return
