"""How many bytes are kept between forward and backward, and the most that is allocated at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.peers import Layer


def saved_bytes(layer: Layer, parameters: Iterable[Tensor]) -> int:
    """`kept_bytes` of a peer's layer."""
    with layer.context():
        return kept_bytes(lambda: layer.call(layer.leaves["x"]), parameters)


def kept_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of all storages that autograd keeps for backward, inputs included, without those of `parameters`.

    A storage that is kept twice, or by two views, counts once.
    """
    known = {_storage(tensor) for tensor in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(kept.values())


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """The most that PyTorch's allocator holds at once during `step`, beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    held = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
