"""`bitmap_lanes.cpp`, the blocks of csrc/bitmap_linear.cu on the host: compiled where there is a C++ compiler."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.bitmap import BitmapWeight
from tests.csrc.nf4_lanes import COMPILER, CSRC, FLAGS

FAULTS = (
    "",
    "reads outside shared memory",
    "two lanes meet in a bank",
    "reads beyond the values",
    "stored twice",
    "does not fit",
)


class Gpu(NamedTuple):
    multiprocessors: int
    shared_bytes: int
    clusters: bool


class Plan(NamedTuple):
    strips: int
    chunks: int
    turns: int
    width: int
    groups: int
    splits: int
    tiles: int
    threads: int
    shared_bytes: int


class Lanes:
    def __init__(self, folder: Path) -> None:
        target = folder / "bitmap_lanes.so"
        command = [COMPILER, *FLAGS, f"-I{CSRC}", str(Path(__file__).with_suffix(".cpp")), "-o", str(target)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(target))

    def linear(self, x: Tensor, weight: BitmapWeight, gpu: Gpu) -> Tensor:
        """x Wᵀ in float64, as the blocks of a GPU divide it."""
        x = x.contiguous()
        y = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=torch.float64)
        tensors = (ctypes.c_void_p * 4)(*(tensor.data_ptr() for tensor in weight.tensors))
        fault = self.library.bitmap_linear(
            _native.DTYPES[x.dtype], _numbers(weight.numbers), tensors, ctypes.c_int64(weight.values.shape[0]),
            (ctypes.c_int * 3)(*gpu), x.shape[0], ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()),
        )  # fmt: skip
        assert not fault, FAULTS[fault]
        return y

    def plan(self, numbers: list[int], gpu: Gpu) -> Plan | None:
        """How a GPU divides a weight of these numbers, None of one that does not fit the kernel's indices."""
        plan = (ctypes.c_int * len(Plan._fields))()
        fault = self.library.bitmap_plan_of(_numbers(numbers), (ctypes.c_int * 3)(*gpu), plan)
        return None if fault else Plan(*plan)


def _numbers(numbers: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * 4)(*numbers[:4])
