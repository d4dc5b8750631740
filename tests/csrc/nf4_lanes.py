"""`nf4_lanes.cpp`, the lanes of csrc/nf4_linear.cu on the host: compiled where there is a C++ compiler, called here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.nf4 import NF4Weight

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
# As `_cuda` is: no value here comes from contraction, which the device does not do.
FLAGS = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]

# What decodes a row: by the pair table, its lower half by byte planes, as rows that begin anywhere.
FORMS = {"table": (0, 0), "planes": (0, 1), "any": (1, 0)}
PLAIN, NESTED, ANY = range(3)


class Lanes:
    def __init__(self, folder: Path) -> None:
        target = folder / "nf4_lanes.so"
        command = [COMPILER, *FLAGS, f"-I{CSRC}", str(Path(__file__).with_suffix(".cpp")), "-o", str(target)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(target))

    def weights(self, q: NF4Weight, dtype: torch.dtype, form: str = "table") -> tuple[Tensor, int]:
        """The matrix as the lanes decode it, and which kind of rows they took."""
        n, k, *_ = q.layout
        out = torch.zeros(n, k, dtype=dtype)
        any_rows, planes = FORMS[form]
        code = _native.DTYPES[dtype]
        kind = self.library.nf4_weights(code, layout(q), tensors(q), any_rows, planes, ctypes.c_void_p(out.data_ptr()))
        assert kind >= 0
        return out, kind

    def linear(self, x: Tensor, q: NF4Weight, plan: list[int], form: str = "table") -> Tensor:
        """x Wᵀ in float64 in the order of a plan."""
        x = x.contiguous()
        y = torch.zeros(x.shape[0], q.layout[0], dtype=torch.float64)
        self.library.nf4_linear(
            _native.DTYPES[x.dtype], layout(q), tensors(q), FORMS[form][0], (ctypes.c_int * 7)(*plan), x.shape[0],
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()),
        )  # fmt: skip
        return y

    def plan(self, n: int, k: int, clusters: tuple[int, int, int, int]) -> list[int]:
        """units, groups, splits, steps, steps per split, tiles, blocks."""
        plan = (ctypes.c_int * 7)()
        self.library.nf4_plan_of(ctypes.c_int64(n), ctypes.c_int64(k), (ctypes.c_int * 4)(*clusters), plan)
        return list(plan)


def layout(q: NF4Weight) -> ctypes.Array:
    return (ctypes.c_int64 * 6)(*q.layout[:5], q.packed.nbytes)


def tensors(q: NF4Weight) -> ctypes.Array:
    return (ctypes.c_void_p * 5)(*(None if tensor is None else tensor.data_ptr() for tensor in q[:5]))
