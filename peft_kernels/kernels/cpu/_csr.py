"""`sparse_linear` with layout "csr" on a CPU: csrc/csr_linear.cpp.

A kept number meets 16 rows of x (dY) at a time, turned so that they are contiguous: about as many instructions as a
dense product takes for two of its numbers, so that what is kept has to be few.
"""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.cpu.lora_linear import place
from peft_kernels.kernels.cpu.philox_dropout import row_major

ROWS_BELOW_MATRIX_UNITS = 256
"""Up to so many rows even a matmul that takes no time is slower, by what it takes to decode the weight."""
MANY_ROWS, MUCH_KEPT = 256, 0.25


def unproven(problem) -> str | None:
    if problem.m > MANY_ROWS and problem.density > MUCH_KEPT:
        return "more than about a quarter is kept, and matmuls on decoded pieces are faster for so many rows"
    return None


def _arguments(weight) -> tuple:
    """What both kernels are told of the weight; the tensors live as long as the caller holds the second part."""
    tensors = [tensor.contiguous() for tensor in weight.tensors]
    return (*weight.shape, _native.DTYPES[weight.dtype], *(tensor.data_ptr() for tensor in tensors)), tensors


def forward(x, weight, bias):
    x, (arguments, _tensors) = row_major(x), _arguments(weight)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    _native.load("_cpu").csr_linear_forward(
        *arguments, x.shape[0], x.data_ptr(), x.stride(0), place(bias)[0], y.data_ptr(), torch.get_num_threads()
    )
    return y


def backward(grad_y, x, weight, needs):
    """Gradients (dx, None, dbias); None where `needs` says that nobody asked."""
    grads, (arguments, _tensors) = row_major(grad_y), _arguments(weight)
    grad_x = None
    if needs[0]:
        grad_x = torch.empty(grads.shape[0], weight.shape[1], dtype=grads.dtype)
        _native.load("_cpu").csr_linear_backward(
            *arguments, grads.shape[0], grads.data_ptr(), grads.stride(0), grad_x.data_ptr(), torch.get_num_threads()
        )
    return grad_x, None, sum_rows(grad_y) if needs[2] else None
