"""The compiled parts of the package, loaded on first use: `_cpu` (csrc/*.cpp) and `_cuda` (csrc/*.cu).

Both are optional and neither is ever built here: `setup.py` does that at installation. A part that cannot be loaded is
remembered with the reason, which `dispatch` reports and `peft-kernels doctor` prints.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch

PARTS = ("_cpu", "_cuda")

# The element types of csrc/numeric.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Status(NamedTuple):
    """`info` is what the part says of its build (compiler, architectures); None, with a `reason`, when not loaded."""

    part: str
    info: dict[str, Any] | None
    reason: str | None


def _bind_openmp() -> None:
    """Offers `_cpu`, which is linked against no OpenMP runtime, the one that torch has already loaded: torch's wheels
    carry their own copy, under names that differ between builds, and a second one would bring a second thread pool."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        loaded = set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[-.]\S*", maps.read()))
    library = min(loaded, key=lambda path: ("/torch" not in path, path), default="libgomp.so.1")
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _load(part: str) -> tuple[ModuleType | None, str | None]:
    name = f"peft_kernels.{part}"
    try:
        if part == "_cpu" and sys.platform == "linux":
            _bind_openmp()
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"{name} could not be loaded: {error}"
        return None, f"{name} is not built (PEFT_KERNELS_BUILD=1 pip install ... says why)"
    except (ImportError, OSError) as error:
        return None, f"{name} could not be loaded: {error}"


def why_not(part: str) -> str | None:
    """Why a part cannot be used, or None when it is loaded."""
    return _load(part)[1]


def load(part: str) -> ModuleType:
    """The module of a part.

    Raises:
        ImportError: it is not built or could not be loaded; the message says which and why.
    """
    module, reason = _load(part)
    if module is None:
        raise ImportError(reason)
    return module


def status() -> tuple[Status, ...]:
    """What is loaded, with compiler and architectures, or why not: one line for each part in `peft-kernels doctor`."""
    rows = []
    for part in PARTS:
        module, reason = _load(part)
        rows.append(Status(part, module.build_info() if module is not None else None, reason))
    return tuple(rows)
