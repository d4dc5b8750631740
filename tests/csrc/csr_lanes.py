"""`csr_lanes.cpp`, the blocks of csrc/csr_linear.cu on the host: compiled where there is a C++ compiler."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.csr import CsrWeight
from peft_kernels.kernels.cuda._operands import padded_rows
from tests.csrc.nf4_lanes import COMPILER, CSRC, FLAGS

FAULTS = (
    "",
    "reads outside the groups",
    "a column that there is not",
    "a column that is not staged",
    "stored twice",
    "does not fit",
)


class Gpu(NamedTuple):
    multiprocessors: int
    shared_bytes: int


class Plan(NamedTuple):
    lanes: int
    parts: int
    warps: int
    rows: int
    tiles: int
    blocks: int
    at_once: int


class Lanes:
    def __init__(self, folder: Path) -> None:
        target = folder / "csr_lanes.so"
        command = [COMPILER, *FLAGS, f"-I{CSRC}", str(Path(__file__).with_suffix(".cpp")), "-o", str(target)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(target))

    def linear(self, x: Tensor, weight: CsrWeight, gpu: Gpu) -> tuple[Tensor, Plan]:
        """x Wᵀ in float64, as the blocks of a GPU divide it, and how they do."""
        x, (n, k) = padded_rows(x).contiguous(), weight.shape
        y = torch.full((x.shape[0], n), float("nan"), dtype=torch.float64)
        used = (ctypes.c_int * len(Plan._fields))()
        tensors = [ctypes.c_void_p(tensor.data_ptr()) for tensor in weight.tensors]
        fault = self.library.csr_linear(
            _native.DTYPES[x.dtype], *_sizes(n, k, weight.values.shape[0]), *tensors, (ctypes.c_int * 2)(*gpu),
            x.shape[0], ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), used,
        )  # fmt: skip
        assert not fault, FAULTS[fault]
        return y, Plan(*used)

    def plan(self, n: int, groups: int, gpu: Gpu) -> Plan:
        """How a GPU divides a weight of so many groups."""
        plan = (ctypes.c_int * len(Plan._fields))()
        self.library.csr_plan_of(*_sizes(n, groups), (ctypes.c_int * 2)(*gpu), plan)
        return Plan(*plan)

    def ahead(self, n: int, groups: int, gpu: Gpu) -> list[list[int]]:
        """[begin, end) of the groups that each block asks for at once."""
        spans = torch.zeros(self.plan(n, groups, gpu).blocks, 2, dtype=torch.int64)
        self.library.csr_ahead(*_sizes(n, groups), (ctypes.c_int * 2)(*gpu), ctypes.c_void_p(spans.data_ptr()))
        return spans.tolist()


def _sizes(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in sizes]
