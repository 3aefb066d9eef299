"""Worker processes of the experiments: one pool for all runs, spread over the GPUs."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any

import torch

from provenance import environment

Execute = Callable[[Mapping[str, Any], int, bool, str], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        experiment: Its name.
        cell: The name of its setting.
        seed: Of the run.
        settings: What ``execute`` gets.
        execute: ``(settings, seed, quick, device) -> numbers``, at module level.
    """

    experiment: str
    cell: str
    seed: int
    settings: Mapping[str, Any]
    execute: Execute

    def run(self, quick: bool, device: str) -> dict[str, Any]:
        """Runs it here, on one thread."""
        torch.set_num_threads(1)
        result = self.execute(self.settings, self.seed, quick, device)
        about = {"cell": self.cell, "seed": self.seed, "settings": dict(self.settings)}
        return {**about, **result, "environment": environment(device)}


@dataclass(frozen=True)
class Workers:
    """Where and how long.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        jobs: Processes; 1: this one, unless there is a time limit.
        gpus: GPUs that the processes take in turn.
        minutes: What runs when they are over is ended and lost; None: no limit.
    """

    device: str = "cpu"
    jobs: int = 1
    gpus: int = 1
    minutes: float | None = None

    def results(
        self, next_job: Callable[[], Job | None], quick: bool
    ) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
        """Asks for jobs until there are none or time is over; yields results as they come.

        Jobs are asked for one by one, when a process is free, so that what was found can decide
        what comes next. A run that fails yields its error, and the others go on.
        """
        if self.jobs == 1 and self.minutes is None:
            while (job := next_job()) is not None:
                result: dict[str, Any] | Exception
                try:
                    result = job.run(quick, self.device)
                except Exception as error:  # whatever it was, the others go on
                    result = error
                yield job, result
            return
        end = float("inf") if self.minutes is None else time.monotonic() + 60 * self.minutes
        # Threads of numpy and the like: there are as many processes as cores already.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # Spawned, as a forked process cannot use CUDA if this one has.
        context = multiprocessing.get_context("spawn")
        numbers: Queue[int] = context.Queue()
        for number in range(self.jobs):
            numbers.put(number % self.gpus)
        running: dict[Future[dict[str, Any]], Job] = {}
        with ProcessPoolExecutor(
            self.jobs, mp_context=context, initializer=_take_gpu, initargs=(numbers, self.gpus)
        ) as pool:
            while True:
                while len(running) < self.jobs and time.monotonic() < end:
                    if (job := next_job()) is None:
                        break
                    running[pool.submit(job.run, quick, self.device)] = job
                if not running:
                    return
                left = None if end == float("inf") else max(0.0, end - time.monotonic())
                done, _ = wait(running, timeout=left, return_when=FIRST_COMPLETED)
                if not done:
                    for process in multiprocessing.active_children():
                        process.terminate()
                    return
                for future in done:
                    job = running.pop(future)
                    error = future.exception()
                    if isinstance(error, Exception):
                        yield job, error
                    else:
                        yield job, future.result()


def _take_gpu(numbers: Queue[int], gpus: int) -> None:
    """Keeps all GPUs but one from a process that has not used CUDA yet."""
    number = numbers.get()
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number]
