"""`multi_lora_lanes.cpp`, the threads of csrc/multi_lora_linear.cu on the host: compiled where there is a C++ compiler,
called here."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.adapter_table import Adapters
from tests.csrc.nf4_lanes import COMPILER, CSRC, FLAGS

__all__ = ["COMPILER", "Lanes"]

FAULTS = (
    "", "reads memory that no argument names", "leaves its shared memory", "sends before all blocks are ready",
    "waits for what never comes", "sends to a block that has ended", "ends with messages or copies on their way",
)  # fmt: skip


class Lanes:
    def __init__(self, folder: Path) -> None:
        target = folder / "multi_lora_lanes.so"
        command = [str(COMPILER), *FLAGS, f"-I{CSRC}", str(Path(__file__).with_suffix(".cpp")), "-o", str(target)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(target))

    def add_updates(
        self, ys: list[Tensor], x: Tensor, adapters: Adapters, ids: Tensor, mix: Tensor | None = None, *,
        factors: list[Tensor] | None = None, rank: int | None = None, team: int = 0, late: bool = True, seed: int = 1,
    ) -> list[Tensor]:  # fmt: skip
        """y_j += the updates, as `kernels.cuda.multi_lora_linear.add_updates` launches them. `factors`: tensors whose
        reads are counted; the counts of their elements are returned. `team`: blocks where there are no clusters."""
        table, dtype = adapters.table(torch.device("cpu")), adapters.dtype or x.dtype
        counted = list(factors or [])
        read_only = [x, ids, table.rows, *([] if mix is None else [mix]), *ys]
        if factors is None:
            read_only += [*adapters.lora_As, *adapters.lora_Bs]
        extents = [_extent(t) for t in (*counted, *read_only)]
        counts = [torch.zeros(size, dtype=torch.int32) for _, size in extents[: len(counted)]]
        numbers = [
            x.shape[0], x.shape[1], ids.shape[1], max(adapters.widths) if rank is None else rank,
            _native.DTYPES[x.dtype], _native.DTYPES[dtype], x.stride(0), table.rows.shape[0],
            table.rows.stride(0), team, int(late), seed,
        ]  # fmt: skip
        sizes = [size for y, layer in zip(ys, table.layers, strict=True) for size in (layer, y.shape[1])]
        fault = self.library.multi_lora(
            _numbers(numbers), _pointer(x), _pointer(ids), _pointer(mix), _pointer(table.rows), len(ys),
            _pointers(ys), _numbers(sizes), len(extents), (ctypes.c_void_p * len(extents))(*(at for at, _ in extents)),
            _numbers([size for _, size in extents]),
            _pointers([*counts, *([None] * len(read_only))]),
        )  # fmt: skip
        assert fault >= 0, "cannot be launched"
        assert fault == 0, FAULTS[fault]
        return [count[:: t.element_size()].contiguous() for t, count in zip(counted, counts, strict=True)]


def _extent(t: Tensor) -> tuple[int, int]:
    """Address and bytes from the first element of `t` to its last, what lies between its rows included."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size() if t.numel() else 0


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _pointers(tensors) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _numbers(values) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)
