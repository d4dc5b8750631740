"""Compiles the Triton kernels that host code would launch, for a GPU that is not there, and reads the machine code.

The host functions run on meta tensors (sizes and strides, no memory). Each launch goes through Triton's own launcher up
to the compiled kernel, so that what is inspected is specialised exactly as on a GPU.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from peft_kernels.kernels.triton import _launch

# Bytes of shared memory that one thread block may use, from the programming guide's table: 9.0 and 10.0 have 227 KiB,
# 12.0 has 99 KiB. 8.0 has 163 KiB, but its configurations also serve 8.6 and 8.9, which have 99.
SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Machine:
    """What a kernel became: registers and local-memory bytes a thread, shared bytes a block, and its SASS."""

    name: str
    registers: int
    local_bytes: int
    shared_bytes: int
    warps: int
    sass: str

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))

    @property
    def copies(self) -> int:
        """Asynchronous copies from global to shared memory."""
        return self.count(r"\bLDGSTS\b")

    @property
    def wide_copies(self) -> int:
        """Those of 16 bytes a thread."""
        return self.count(r"\bLDGSTS\.[.\w]*128\b")

    @property
    def bulk_copies(self) -> int:
        """Copies of whole tiles by the TMA unit."""
        return self.count(r"\bUTMALDG\b")

    @property
    def instructions(self) -> int:
        return self.count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+\S")

    @property
    def tensor_core(self) -> str:
        """The family of the tensor-core instructions: HGMMA (Hopper), HMMA (Ampere), UTCHMMA (Blackwell), or none."""
        families = ("UTCHMMA", "UTCMMA", "HGMMA", "HMMA")
        return next((family for family in families if self.count(rf"\b{family}\b|\b{family}\.")), "none")


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
        patch.setattr(_launch, "architecture", lambda device: arch)
        patch.setattr(_launch, "launch", record)
        patch.setattr(driver, "_active", _Driver(int(arch.removeprefix("sm_"))))
        host()
    return compiled


def disassemble(compiled) -> Machine:
    registers, spilled, sass = _dump(compiled.asm["cubin"])
    metadata = compiled.metadata
    return Machine(metadata.name, registers, spilled, metadata.shared, metadata.num_warps, sass)


@functools.lru_cache(maxsize=64)
def _dump(cubin: bytes) -> tuple[int, int, str]:
    """(registers, bytes of local memory, SASS). Several tests read the same kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_BIN / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, text
