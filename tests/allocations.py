"""Peak of a CPU step's tensor memory, from PyTorch's own allocator events, and of the process's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that tensors allocated by `step` took at one time; what was there before does not count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = step()
        del result
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def memory_of_process(name: str) -> int:
    """Bytes: "VmRSS", what the process takes now, or "VmHWM", the most since `forget_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def forget_peak() -> None:
    """ "VmHWM" counts from here on. Skips the test where the system does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of the process's memory cannot be reset: {error}")
