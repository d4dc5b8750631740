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
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.bitmap import BitmapWeight
from peft_kernels.kernels.composed import sparse_linear as composed
from peft_kernels.kernels.cuda._availability import next_implementation, not_an_nvidia_gpu, not_built
from peft_kernels.kernels.cuda.nf4_linear import aligned_rows
from peft_kernels.ops.sparse_linear import problem

MAX_ROWS = 8
DTYPES = (torch.float16, torch.bfloat16)
# What indices of 32 bits in the kernel allow.
_MAX_SIZE = 0x7FFF0000
_X_COLUMNS = 8  # that the kernel loads at once


def unsupported(problem) -> str | None:
    if (reason := not_an_nvidia_gpu(problem)) is not None:
        return reason
    if problem.layout != "bitmap":
        return f"for layout 'bitmap'; the weight has {problem.layout!r}"
    if problem.dtype not in DTYPES:
        return f"multiplies in float16 and bfloat16, not in {problem.dtype}"
    if problem.weight_dtype != problem.dtype:
        return f"for a weight of x's dtype, {problem.dtype}; its dtype is {problem.weight_dtype}"
    if problem.m > MAX_ROWS:
        return f"for at most {MAX_ROWS} rows; the weight would be read once for each {MAX_ROWS}"
    if problem.m == 0 or problem.n == 0 or problem.k == 0:
        return "nothing to compute"
    if max(problem.n, problem.k) > _MAX_SIZE:
        return f"a side of the weight is above {_MAX_SIZE}"
    return not_built(problem)


def unproven(problem) -> str | None:
    return "not yet measured on a GPU against the alternatives"


def forward(x, weight, bias):
    plan = _plan(x.device.index, *weight.numbers[:4])
    if plan is None:
        return composed.forward(x, weight, bias)
    return launch(x, weight, bias, plan)


def backward(grad_y, x, weight, needs):
    """The gradients by the implementation that is next in the order: this one has no kernel for them."""
    return next_implementation("sparse_linear", problem(grad_y, weight)).backward(grad_y, x, weight, needs)


def padded_rows(x: Tensor) -> Tensor:
    """x, or a copy, in rows that begin at multiples of 16 bytes and end with zeros at a multiple of 8 columns."""
    missing = -x.shape[1] % _X_COLUMNS
    return aligned_rows(F.pad(x, (0, missing)) if missing else x)


def launch(x: Tensor, weight: BitmapWeight, bias: Tensor | None, plan) -> Tensor:
    """y = x Wᵀ + bias by a plan of `bitmap_plan`."""
    n, k, panels, most_slots, _ = weight.numbers
    x = padded_rows(x)
    values, bits, starts, order = (_aligned(tensor) for tensor in weight.tensors)
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


def _aligned(tensor: Tensor) -> Tensor:
    """Itself, or a copy that is contiguous and begins at a multiple of 16 bytes (a view of a file may not)."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@functools.lru_cache(maxsize=4096)
def _plan(device: int, n: int, k: int, panels: int, most_slots: int):
    """How the work is divided on this GPU (csrc/bitmap.h), None where a block has too little shared memory."""
    gpu = _gpu(device)
    plan = _native.load("_cuda").bitmap_plan(n, k, panels, most_slots, gpu)
    return plan if plan.shared_bytes <= gpu.shared_bytes else None


@functools.cache
def _gpu(device: int):
    return _native.load("_cuda").bitmap_gpu(device)
