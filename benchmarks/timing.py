"""The timer that records what a stopwatch read, and the device's measured ceilings."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.problems import Ceilings
from peft_kernels.tuning.timing import (
    Context,
    EventStopwatch,
    HostStopwatch,
    Step,
    Stopwatch,
    sets_beyond_cache,
    stopwatch,
)

__all__ = [
    "Clock", "Context", "EventStopwatch", "HostStopwatch", "Step", "Stopwatch", "clock", "measure_ceilings",
    "sets_beyond_cache", "stopwatch",
]  # fmt: skip


class Clock:
    """pytest-benchmark's timer: stands still but for `advance`, so that what is recorded is a stopwatch's reading
    (GPU time, or a call's share of a loop) and not the time that its measurement took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


clock = Clock()


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """The rate of one large matmul and the bandwidth of one large copy on this device, the best of several runs."""
    size, length = (8192, 1 << 30) if device != "cpu" else (1024, 1 << 26)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randint(-128, 127, (length,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    matmul = _best(device, lambda: torch.mm(a, b))
    return Ceilings(2 * size**3 / matmul, 2 * length / _best(device, lambda: _copy(target, source)))


def _copy(target: Tensor, source: Tensor) -> Tensor:
    return target.copy_(source)


def _best(device: str, step: Step) -> float:
    watch = stopwatch(device, [step])
    return min(watch.sample() for _ in range(5))
