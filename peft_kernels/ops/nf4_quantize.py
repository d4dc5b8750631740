"""The op `nf4_quantize`: a dense weight to 4-bit indices and the absmax of each block. No gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch

SCHEMAS = {
    # weight [...], contiguous; packed uint8 [ceil(numel / 2)], absmax float32 [ceil(numel / blocksize)].
    "nf4_quantize": "(Tensor weight, int blocksize) -> (Tensor packed, Tensor absmax)",
}


class Problem(NamedTuple):
    """What dispatch chooses by."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    numel: int
    blocksize: int


def problem(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> Problem:
    return Problem(weight.device.type, weight.device.index, weight.dtype, weight.numel(), blocksize)


def kernel(weight, blocksize):
    return dispatch.select("nf4_quantize", problem(weight, blocksize)).forward(weight.contiguous(), blocksize)


def fake(weight, blocksize):
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty(-(-n // blocksize), dtype=torch.float32)


KERNELS = {"nf4_quantize": (kernel, fake)}


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return torch.ops.peft_kernels.nf4_quantize(weight, blocksize)
