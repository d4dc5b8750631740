"""Stopwatches: seconds per call of a step, on the host or on the GPU."""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

logger = logging.getLogger("peft_kernels")

Step = Callable[[], object]
Context = Callable[[], AbstractContextManager]

SAMPLE_SECONDS = 0.005
CALLS_PER_GRAPH = 16


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection inside a sample."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class HostStopwatch:
    """Time of a call over a loop long enough that the clock's resolution does not matter: wall-clock time, or the CPU
    time of the calling thread where that is the only one that works, which leaves other processes out."""

    def __init__(
        self, steps: list[Step], context: Context = contextlib.nullcontext, *, one_thread: bool = False
    ) -> None:
        (self.step,), self.context = steps, context
        self.kind, self.now = ("thread", time.thread_time) if one_thread else ("host", time.perf_counter)
        with context():
            for _ in range(3):
                self.step()
        self.calls = 1
        while self.sample() * self.calls < SAMPLE_SECONDS:
            self.calls *= 2

    def sample(self) -> float:
        step, now = self.step, self.now
        with self.context(), _quiet():
            start = now()
            for _ in range(self.calls):
                step()
            return (now() - start) / self.calls


class GraphStopwatch:
    """GPU time of a call: a CUDA graph that runs the step on several sets of tensors in turn, timed by events.

    The graph leaves launch gaps out; the sets together exceed the L2 cache, so that each call finds it cold.
    """

    kind = "cuda-graph"

    def __init__(self, steps: list[Step], context: Context = contextlib.nullcontext) -> None:
        self.calls = len(steps) * max(1, -(-CALLS_PER_GRAPH // len(steps)))
        turns = self.calls // len(steps)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with context():
            with torch.cuda.stream(stream):
                for step in steps * 3:
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                for step in steps * turns:
                    step()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self) -> float:
        # The first replay keeps the GPU busy while the second is enqueued: otherwise the events would time that gap.
        self.graph.replay()
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / self.calls


class EventStopwatch:
    """GPU time of a call that cannot be captured in a graph. Small problems include launch gaps."""

    kind = "cuda-events"

    def __init__(self, steps: list[Step], context: Context = contextlib.nullcontext) -> None:
        self.steps, self.context = steps, context
        self.turns = max(1, -(-CALLS_PER_GRAPH // len(steps)))
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.sample()

    def sample(self) -> float:
        with self.context():
            self.steps[0]()
            self.start.record()
            for step in self.steps * self.turns:
                step()
            self.end.record()
            self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / (len(self.steps) * self.turns)


Stopwatch = HostStopwatch | GraphStopwatch | EventStopwatch


def stopwatch(
    device: str, steps: list[Step], context: Context = contextlib.nullcontext, *, one_thread: bool = False
) -> Stopwatch:
    """The stopwatch for steps on that device; each step does the same work on tensors of its own. `one_thread` says
    that a CPU's step runs on the calling thread alone."""
    if device == "cpu":
        return HostStopwatch(steps, context, one_thread=one_thread)
    try:
        return GraphStopwatch(steps, context)
    except RuntimeError as error:
        # Some peers read GPU values on the host or allocate in ways that capture refuses. The kind is recorded.
        logger.warning("not captured in a CUDA graph, timed by events instead: %s", str(error).splitlines()[0])
        torch.cuda.synchronize()
        return EventStopwatch(steps, context)


def sets_beyond_cache(device: str, bytes_per_call: int, most: int = 64) -> int:
    """How many sets of tensors together are three times the L2 cache; on a GPU at least two, and `most` at most."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(most, max(2, -(-3 * cache // bytes_per_call)))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high
