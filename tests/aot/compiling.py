"""Compiles the Triton kernels that host code would launch, for a GPU that is not there, and reads the machine code.

The host functions run on meta tensors (sizes and strides, no memory). Each launch goes through Triton's own launcher up
to the compiled kernel, so that what is inspected is specialised exactly as on a GPU.

PEFT_KERNELS_AOT=all compiles every configuration of `tuning`; otherwise one of each kind (`by_default`).
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from peft_kernels.kernels.triton import _launch

# Bytes of shared memory that one thread block may use, from the programming guide's table: 9.0 and 10.0 have 227 KiB,
# 12.0 has 99 KiB. 8.0 has 163 KiB, but its configurations also serve 8.6 and 8.9, which have 99.
SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}

# One PTX instruction of these becomes one instruction of the machine code (test_compiling.py), and PTX is there without
# disassembling, which takes half as long as compiling.
_PRODUCTS = {"tcgen05.mma": "UTCHMMA", "wgmma.mma_async": "HGMMA", "mma.sync": "HMMA"}
_COPY = r"\bcp\.async\.c[ag]\.shared\.global\b"
_BULK_COPY = r"\bcp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global\b"

ALL = "all"
WANTED = os.environ.get("PEFT_KERNELS_AOT", "")
if WANTED not in ("", ALL):
    raise ValueError(f"PEFT_KERNELS_AOT is {WANTED!r}; expected {ALL!r} or nothing")

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Machine:
    """What a kernel became: registers and local-memory bytes a thread, shared bytes a block, its PTX and its SASS."""

    name: str
    registers: int
    local_bytes: int
    shared_bytes: int
    warps: int
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @property
    def sass(self) -> str:
        return _sass(self.cubin)

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))

    @property
    def copies(self) -> int:
        """Asynchronous copies from global to shared memory."""
        return len(re.findall(_COPY, self.ptx))

    @property
    def wide_copies(self) -> int:
        """Those of 16 bytes a thread."""
        return len(re.findall(rf"{_COPY}[^;]*\], 0x10\b", self.ptx))

    @property
    def bulk_copies(self) -> int:
        """Copies of whole tiles by the TMA unit."""
        return len(re.findall(_BULK_COPY, self.ptx))

    @property
    def instructions(self) -> int:
        return self.count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+\S")

    @property
    def tensor_core(self) -> str:
        """The family of the tensor-core instructions: HGMMA (Hopper), HMMA (Ampere), UTCHMMA (Blackwell), or none."""
        return next((family for start, family in _PRODUCTS.items() if re.search(rf"\b{start}\b", self.ptx)), "none")


class _Driver:
    """Stands for a GPU up to the point where a kernel would be loaded onto it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_launches(monkeypatch, arch: str, host: Callable[[], object]) -> list:
    """Runs `host` as if on a GPU of `arch`; the compiled kernels of its launches, in order."""
    compiled = []

    def record(kernel, grid, device, *arguments, **options):
        compiled.append(kernel.warmup(*arguments, grid=grid, **options))

    with monkeypatch.context() as patch:
        patch.setattr(knobs.compilation, "disable_line_info", True)  # a fifth of the time, and no instruction
        patch.setattr(_launch, "architecture", lambda device: arch)
        patch.setattr(_launch, "launch", record)
        patch.setattr(driver, "_active", _Driver(int(arch.removeprefix("sm_"))))
        host()
    return compiled


def disassemble(compiled) -> Machine:
    cubin, metadata = compiled.asm["cubin"], compiled.metadata
    usage = _dump(cubin, "-res-usage")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    return Machine(metadata.name, registers, stack + local, metadata.shared, metadata.num_warps, ptx, cubin)


@functools.lru_cache(maxsize=64)
def _sass(cubin: bytes) -> str:
    """Several tests read the same kernel."""
    return _dump(cubin, "-sass")


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_BIN / "cuobjdump", option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def by_default(cases: Iterable, kind: Callable[..., Hashable]) -> list:
    """The last case of each kind, of cases from the narrowest to the widest; with PEFT_KERNELS_AOT=all every case."""
    cases = list(cases)
    return cases if WANTED == ALL else list({kind(case): case for case in cases}.values())
