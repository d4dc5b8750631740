"""`nf4_linear` on a CPU: csrc/nf4_linear.cpp."""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.kernels.cpu import nf4_dequantize
from peft_kernels.kernels.cpu.lora_linear import place
from peft_kernels.kernels.cpu.nf4_dequantize import arguments, contiguous
from peft_kernels.kernels.cpu.philox_dropout import row_major


def unsupported(problem) -> str | None:
    return nf4_dequantize.unsupported(problem)


def forward(x, q, bias):
    n, q, x = q.layout[0], contiguous(q), row_major(x)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    _native.load("_cpu").nf4_linear_forward(
        *arguments(q), x.shape[0], _native.DTYPES[x.dtype], x.data_ptr(), x.stride(0), place(bias)[0], y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def backward(grad_y, q):
    k, q, grad_y = q.layout[1], contiguous(q), row_major(grad_y)
    grad_x = torch.empty(grad_y.shape[0], k, dtype=grad_y.dtype)
    _native.load("_cpu").nf4_linear_backward(
        *arguments(q), grad_y.shape[0], _native.DTYPES[grad_y.dtype], grad_y.data_ptr(), grad_y.stride(0),
        grad_x.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x
