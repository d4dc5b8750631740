"""`nf4_quantize` on a CPU: csrc/nf4_quantize.cpp.

4096 x 4096 in bfloat16, CPU time of one thread of a busy AVX2 server: 17 ms, and 5 ms for double quantisation (PyTorch,
`formats.nf4.nested`); bitsandbytes 0.50.2 took 730 to 950 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.kernels.cpu import nf4_dequantize


def unsupported(problem) -> str | None:
    return nf4_dequantize.unsupported(problem)


def forward(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    weight, n = weight.contiguous(), weight.numel()
    packed, absmax = torch.empty((n + 1) // 2, dtype=torch.uint8), torch.empty(-(-n // blocksize))
    _native.load("_cpu").nf4_quantize(
        weight.data_ptr(), _native.DTYPES[weight.dtype], n, blocksize, packed.data_ptr(), absmax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return packed, absmax
