"""What every CUDA kernel of csrc asks before its own limits, and who computes what it does not."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from peft_kernels import _native, dispatch


def not_an_nvidia_gpu(problem) -> str | None:
    if problem.device != "cuda":
        return f"for CUDA tensors; x is on {problem.device}"
    return "written for NVIDIA GPUs, not for ROCm" if torch.version.hip is not None else None


def not_built(problem) -> str | None:
    """Why the extension does not run on this GPU. Without any GPU only whether it was built counts."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability(problem.device_index) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return _native.why_not("_cuda")


@functools.lru_cache(maxsize=4096)
def next_implementation(op: str, problem: Any) -> ModuleType:
    """The implementation after CUDA's in the order, for gradients that have no CUDA kernel."""
    backends = (backend for backend in dispatch.ORDER[op] if backend != "cuda")
    return dispatch.implementation(op, next(b for b in backends if dispatch.objection(op, b, problem) is None))
