"""What the host side of every Triton kernel shares: whether Triton can run here, on which GPU, and the launch itself.

Importing this module does not import triton: `dispatch` asks `unavailable` on machines that have none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch

# Triton decides at the decoration of a kernel whether to interpret it, so the flag is read once, like there.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

INTERPRETER_IS_FOR_TESTS = "TRITON_INTERPRET is set: the interpreter is for tests"
NOT_OF_4_BITS = "reads dense weights; over NF4 the base products are `nf4_linear`'s"

# The interpreter has no architecture; these block sizes serve it as well as any.
_ARCH_OF_CPU = "sm_80"
# ... and persistent kernels take several tiles each with so few programs.
_PROGRAMS_OF_CPU = 3


def unavailable(device: str, index: int | None, *dtypes: torch.dtype) -> str | None:
    """Why no Triton kernel of this library can compute in these dtypes on this device, or None."""
    if torch.float64 in dtypes:
        return "float64 runs in PyTorch"
    if device == "cpu":
        if not INTERPRETED:
            return "Triton kernels need an NVIDIA GPU (TRITON_INTERPRET=1 interprets them on the CPU, for tests)"
        if torch.bfloat16 in dtypes:
            return "Triton's interpreter rounds to bfloat16 wrongly"
    elif device != "cuda" or torch.version.hip is not None:
        return f"written for NVIDIA GPUs, not for {'ROCm' if torch.version.hip else device}"
    if not _installed():
        return "triton is not installed"
    if device == "cuda" and not (torch.cuda.is_available() and (index or 0) < torch.cuda.device_count()):
        return "torch sees no such GPU"
    if device == "cuda" and torch.cuda.get_device_capability(index) < (8, 0):
        return f"needs compute capability 8.0 or newer, this GPU has {gpu_architecture(index)}"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def architecture(device: torch.device) -> str:
    """The name under which `tuning` keeps this device's configurations, such as "sm_90"."""
    return gpu_architecture(device.index) if device.type == "cuda" else _ARCH_OF_CPU


@functools.cache
def gpu_architecture(index: int | None) -> str:
    """As `architecture`, of the GPU with this index; None is the current one."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Launches `kernel` on the current stream of `device`, which need not be the current device."""
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*arguments, **options)


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run side by side."""
    return _multiprocessors(device.index) if device.type == "cuda" else _PROGRAMS_OF_CPU


def overlaps(device: torch.device) -> bool:
    """Whether kernels of this device have programmatic dependent launch (compute capability 9.0 and newer).

    A kernel of the library that runs `gdc_launch_dependents` lets the next one start beside it, if that one is launched
    with the options of `overlapping`; any other next kernel waits for its end as ever.
    """
    return device.type != "cpu" and int(architecture(device).removeprefix("sm_")) >= 90


def overlapping(wanted: bool, device: torch.device) -> dict[str, bool]:
    """Options of a launch that may start before its predecessor on the stream has ended, where `wanted` and possible.

    The kernel runs `gdc_wait` before it reads what the predecessor wrote, before it writes what that one may still
    read, and in any case before it ends: the launch after it must find both complete. It may read anything that was
    complete before the predecessor started; a predecessor launched in the ordinary way started when all before it was.
    """
    overlap = wanted and overlaps(device)
    return {"OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}


def bucket(m: int) -> int:
    """M rounded up to a power of two: what configurations are chosen by, so that their number does not grow with the
    batch sizes that occur."""
    return 1 << (m - 1).bit_length() if m > 0 else 0


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def padded_rank(r: int) -> int:
    """The width of a rank tile: a power of two, and at least 16, the smallest that tensor cores multiply."""
    return max(16, 1 << (r - 1).bit_length())


def split(size: int, block: int, tiles: int, programs: int, most: int = 1 << 30) -> tuple[int, int]:
    """Splits a sum over `size`, which goes in steps of `block`, so that `tiles` times the splits fill the GPU.

    Args:
        size: length of the summed dimension.
        block: how many of it a program takes per step.
        tiles: programs that there are without a split.
        programs: programs that fill the GPU.
        most: splits that there may be.

    Returns:
        (number of splits, length of each: a multiple of `block`); one empty split when `size` is 0.
    """
    steps = blocks(size, block)
    wanted = min(max(1, programs // max(1, tiles)), max(1, steps), most)
    steps_per_split = max(1, blocks(steps, wanted))
    return max(1, blocks(steps, steps_per_split)), steps_per_split * block


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: for float32 as PyTorch's matmuls are set up, and without effect on 16-bit types."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
