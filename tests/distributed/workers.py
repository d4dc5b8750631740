"""Two processes in a gloo group that run functions of the tests one after another, each with a time limit.

Starting processes costs more than the tests themselves, so one pair serves a whole file. A function that fails or
hangs takes its pair down; the next test starts a new one.
"""

from __future__ import annotations

import datetime
import io
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
COLLECTIVE_SECONDS = 30
FUNCTION_SECONDS = 60
START_SECONDS = 120


def _serve(rank: int, store: str, tasks: mp.Queue, results: mp.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )  # fmt: skip
    results.put((rank, True, b""))
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            torch.manual_seed(0)
            buffer = io.BytesIO()
            torch.save(function(rank, *args), buffer)
            results.put((rank, True, buffer.getvalue()))
        except Exception:  # handed to the parent process, which raises it
            results.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()


class Workers:
    """`run(function, *args)` calls function(rank, *args) in both processes and returns both results."""

    def __init__(self) -> None:
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._results = context.Queue()
        self._tasks = [context.Queue() for _ in range(WORLD)]
        store = os.path.join(self._folder.name, "store")
        self._processes = [
            context.Process(target=_serve, args=(rank, store, self._tasks[rank], self._results), daemon=True)
            for rank in range(WORLD)
        ]
        for process in self._processes:
            process.start()
        self._collect(START_SECONDS, "start")

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((function, args))
        return self._collect(FUNCTION_SECONDS, function.__name__)

    def _collect(self, seconds: float, what: str) -> list[Any]:
        answers: dict[int, bytes] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < WORLD:
            try:
                rank, good, value = self._results.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                missing = sorted(set(range(WORLD)) - set(answers))
                self._kill()
                raise TimeoutError(f"{what}: no answer from ranks {missing} within {seconds} s") from None
            if not good:
                self._kill()
                raise RuntimeError(f"{what} failed on rank {rank}:\n{value}")
            answers[rank] = value
        return [torch.load(io.BytesIO(answers[r]), weights_only=False) if answers[r] else None for r in range(WORLD)]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(10)
        self._processes = []

    def close(self) -> None:
        if self._processes:
            for tasks in self._tasks:
                tasks.put(None)
            for process in self._processes:
                process.join(10)
        self._kill()
