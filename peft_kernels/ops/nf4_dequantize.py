"""The op `nf4_dequantize`: rows of a 4-bit weight as a dense matrix. No gradient: the weight is frozen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.nf4 import NF4Weight, from_layout

SCHEMAS = {
    # q and layout: `tensors` and `layout` of an NF4Weight.
    "nf4_dequantize": "(Tensor[] q, int[] layout, ScalarType dtype) -> Tensor",
}


class Problem(NamedTuple):
    """What dispatch chooses by."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    n: int
    k: int
    blocksize: int
    nested: bool


def problem(q: NF4Weight, dtype: torch.dtype | None = None) -> Problem:
    n, k, *_ = q.layout
    return Problem(q.device.type, q.device.index, dtype or q.dtype, n, k, q.blocksize, q.is_nested)


def kernel(q, layout, dtype):
    weight = from_layout(q, layout, dtype)
    return dispatch.select("nf4_dequantize", problem(weight)).forward(weight)


def fake(q, layout, dtype):
    return q[0].new_empty(layout[0], layout[1], dtype=dtype)


KERNELS = {"nf4_dequantize": (kernel, fake)}


def nf4_dequantize(q: NF4Weight) -> Tensor:
    """`q`, a matrix, in its own dtype."""
    return torch.ops.peft_kernels.nf4_dequantize(q.tensors, q.layout, q.dtype)
