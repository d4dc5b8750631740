"""Peak memory of one model's training step, also where two models train in one process.

CUDA: the allocator's peak during a step above what was allocated before it, plus the model and its optimizer state.
CPU: the process's high-water mark would mix both models with Python itself, so the tensors are counted: weights,
adapter gradients, optimizer state and what the first step saves for backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_kernels.formats.nf4 import NF4Weight

CUDA_MEASURE = "allocator's peak in a step, of this model and its optimizer"
CPU_MEASURE = "weights, adapter gradients, optimizer state and tensors saved for backward in the first step"


@dataclass
class Memory:
    """Bytes measured over the steps of one model: `saved` for backward in the first step, `peak` in the worst one."""

    saved: int = 0
    peak: int = 0
    steps: int = 0

    @contextlib.contextmanager
    def measured(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
        """Around one training step; hooks see the saved tensors in the first only, since they cost time."""
        resident, before = _resident(model, optimizer), 0
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        with _counting_saved(self, model) if self.steps == 0 else contextlib.nullcontext():
            yield
        if device.type == "cuda":
            peak = resident + torch.cuda.max_memory_allocated(device) - before
        elif self.steps == 0:
            gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            peak = _resident(model, optimizer) + gradients + self.saved
        else:
            peak = self.peak
        self.peak, self.steps = max(self.peak, peak), self.steps + 1


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct storages: tied weights and views count once."""
    return sum(dict(map(_storage, tensors)).values())


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of the model's parameters and buffers, and of the optimizer's state."""
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return _bytes(_owned(model)), _bytes(state)


def _owned(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, 4-bit weights, and what bitsandbytes keeps beside its own."""
    weights = [w for module in model.modules() if isinstance(w := getattr(module, "weight", None), NF4Weight)]
    states = [state for p in model.parameters() if (state := getattr(p, "quant_state", None)) is not None]
    nested = [state.state2 for state in states if state.nested]
    quantised = [tensor for weight in weights for tensor in weight.tensors]
    quantised += [tensor for state in (*states, *nested) for tensor in (state.absmax, state.code)]
    return [*model.parameters(), *model.buffers(), *quantised]


def _resident(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    return sum(held(model, optimizer))


@contextlib.contextmanager
def _counting_saved(memory: Memory, model: nn.Module) -> Iterator[None]:
    owned = {_storage(tensor)[0] for tensor in _owned(model)}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        address, size = _storage(tensor)
        if address not in owned:
            seen[address] = max(size, seen.get(address, 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield
    memory.saved = sum(seen.values())
