"""`nf4_dequantize` on a CPU: csrc/nf4_dequantize.cpp.

4096 x 4096 to bfloat16, CPU time of one thread of a busy AVX2 server: 10 ms, 4.4 ms of them decoding and the others the
system's zeroing of a fresh tensor; bitsandbytes 0.50.2 took 70 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.cpu.lora_linear import DTYPES


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; the weight is on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"no {problem.dtype}"
    return _native.why_not("_cpu")


def contiguous(q: NF4Weight) -> NF4Weight:
    """`q` over contiguous tensors: itself but for weights that were put together from slices. Whoever passes addresses
    of it holds it by name until the call is over: a copy that only its address refers to could be freed before."""
    if all(tensor.is_contiguous() for tensor in q.tensors):
        return q
    return q.with_tensors([tensor.contiguous() for tensor in q.tensors])


def arguments(q: NF4Weight) -> tuple[int, ...]:
    """A contiguous weight as csrc takes it: n, k, row stride, first element, blocksize, five addresses, 0 for None."""
    return (*q.layout[:5], *(0 if tensor is None else tensor.data_ptr() for tensor in q[:5]))


def forward(q: NF4Weight) -> Tensor:
    n, k, *_ = q.layout
    weight, q = torch.empty(n, k, dtype=q.dtype), contiguous(q)
    _native.load("_cpu").nf4_dequantize(
        *arguments(q), _native.DTYPES[q.dtype], weight.data_ptr(), torch.get_num_threads()
    )
    return weight
