"""`sparse_linear` with layout "bitmap" for at most 8 rows by csrc/bitmap_linear.cu: one launch, each byte of the weight
read once, bits turned into tensor-core operands in registers.

Floor: the weight's bytes read once; 4096 x 4096 at 50, 30, 10 % density is 20.0, 13.3 and 6.2 MB: 4.7, 3.1, 1.4 µs at
4.3 TB/s, where a dense weight takes 7.8. Compiled for sm_80, sm_90a and sm_100; never run on a GPU yet
(docs/kernels_sparse.md).

How K is split is a function of the weight and the GPU, not of M: a row has the same bits alone and in a batch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.bitmap import BitmapWeight
from peft_kernels.kernels.cuda._operands import aligned, padded_rows

# What indices of 32 bits in the kernel allow.
_MAX_SIZE = 0x7FFF0000


def unsupported(problem) -> str | None:
    if max(problem.n, problem.k) > _MAX_SIZE:
        return f"a side of the weight is above {_MAX_SIZE}"
    return None


def forward(x, weight, bias) -> Tensor | None:
    """y, or None where a block has too little shared memory."""
    plan = _plan(x.device.index, *weight.numbers[:4])
    return None if plan is None else launch(x, weight, bias, plan)


def launch(x: Tensor, weight: BitmapWeight, bias: Tensor | None, plan) -> Tensor:
    """y = x Wᵀ + bias by a plan of `bitmap_plan`."""
    n, k, panels, most_slots, _ = weight.numbers
    x = padded_rows(x)
    values, bits, starts, order = (aligned(tensor) for tensor in weight.tensors)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _native.load("_cuda").bitmap_linear(
            x.device.index, stream, n, k, panels, most_slots, values.data_ptr(), bits.data_ptr(), starts.data_ptr(),
            order.data_ptr(), plan, x.shape[0], _native.DTYPES[x.dtype], x.data_ptr(), x.stride(0),
            0 if bias is None else bias.data_ptr(), y.data_ptr(),
        )  # fmt: skip
    return y


@functools.lru_cache(maxsize=4096)
def _plan(device: int, n: int, k: int, panels: int, most_slots: int):
    """How the work is divided on this GPU (csrc/bitmap.h), None where a block has too little shared memory."""
    gpu = _gpu(device)
    plan = _native.load("_cuda").bitmap_plan(n, k, panels, most_slots, gpu)
    return plan if plan.shared_bytes <= gpu.shared_bytes else None


@functools.cache
def _gpu(device: int):
    return _native.load("_cuda").bitmap_gpu(device)
