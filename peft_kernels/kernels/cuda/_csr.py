"""`sparse_linear` with layout "csr" for at most 8 rows by csrc/csr_linear.cu: one launch, x in shared memory, where
each kept weight gathers a column of it.

Floor: 4 bytes for a kept weight, read once; 4096 x 4096 at 10 and 5 % density is 6.8 and 3.5 MB: 1.6 and 0.8 µs at
4.3 TB/s, where a dense weight takes 7.8. Compiled for sm_80, sm_90a and sm_100; never run on a GPU yet
(docs/kernels_sparse.md).

How lanes share rows is a function of the weight and the GPU, not of M: a row has the same bits alone and in a batch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.csr import MOST_NARROW, CsrWeight
from peft_kernels.kernels.cuda._operands import aligned, padded_rows


def unsupported(problem) -> str | None:
    if problem.k > MOST_NARROW:
        return f"for at most {MOST_NARROW} input features, whose columns take 16 bits"
    return None


def forward(x, weight, bias) -> Tensor | None:
    """y, or None where a block's shared memory does not hold a row of x."""
    groups = weight.values.shape[0]
    plan = _plan(x.device.index, weight.shape[0], groups)
    rows = _rows_at_once(x.device.index, *weight.shape, groups, x.shape[0])
    return launch(x, weight, bias, plan, rows) if rows else None


def launch(x: Tensor, weight: CsrWeight, bias: Tensor | None, plan, rows: int) -> Tensor:
    """y = x Wᵀ + bias by a plan of `csr_plan`, `rows` rows of x (1, 2, 4 or 8) at a time."""
    x = padded_rows(x)
    values, columns, starts = (aligned(tensor) for tensor in weight.tensors)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _native.load("_cuda").csr_linear(
            x.device.index, stream, *weight.shape, values.shape[0], _native.DTYPES[x.dtype], values.data_ptr(),
            columns.data_ptr(), starts.data_ptr(), plan, x.shape[0], rows, x.data_ptr(), x.stride(0),
            0 if bias is None else bias.data_ptr(), y.data_ptr(),
        )  # fmt: skip
    return y


@functools.lru_cache(maxsize=4096)
def _plan(device: int, n: int, groups: int):
    """How the work is divided on this GPU (csrc/csr_plan.h)."""
    return _native.load("_cuda").csr_plan(n, groups, _gpu(device))


@functools.lru_cache(maxsize=4096)
def _rows_at_once(device: int, n: int, k: int, groups: int, m: int) -> int:
    """How many rows of x a block's shared memory takes at a time, at most m rounded up to a power of two; 0: none."""
    plan, gpu = _plan(device, n, groups), _gpu(device)
    return _native.load("_cuda").csr_rows_at_once(plan, k, m, gpu.shared_bytes)


@functools.cache
def _gpu(device: int):
    return _native.load("_cuda").csr_gpu(device)
