"""`sparse_linear` with layout "block" on a CPU: csrc/block_linear.cpp."""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.cpu.lora_linear import place
from peft_kernels.kernels.cpu.philox_dropout import row_major

ROWS_BELOW_MATRIX_UNITS = 16
"""Up to so many rows the processor's matrix instructions, which PyTorch's matmuls use, do not decide."""


def unproven(problem) -> str | None:
    return None


def _arguments(weight) -> tuple:
    """What every kernel is told of the weight; the tensors live as long as the caller holds the second part."""
    values = weight.values.detach().contiguous()
    numbers = (*weight.shape, weight.block, values.shape[0], _native.DTYPES[values.dtype])
    return (*numbers, values.data_ptr(), weight.indices.data_ptr()), values


def forward(x, weight, bias):
    x, (arguments, _values) = row_major(x), _arguments(weight)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    _native.load("_cpu").block_linear_forward(
        *arguments, x.shape[0], x.data_ptr(), x.stride(0), place(bias)[0], y.data_ptr(), torch.get_num_threads()
    )
    return y


def backward(grad_y, x, weight, needs):
    """Gradients (dx, dvalues, dbias); None where `needs` says that nobody asked."""
    native, (arguments, values) = _native.load("_cpu"), _arguments(weight)
    grads, m, threads = row_major(grad_y), grad_y.shape[0], torch.get_num_threads()
    grad_x = grad_values = None
    if needs[0]:
        grad_x = torch.empty(m, weight.shape[1], dtype=grads.dtype)
        native.block_linear_backward(
            *arguments, m, grads.data_ptr(), grads.stride(0), grad_x.data_ptr(), threads
        )  # fmt: skip
    if needs[1]:
        x, grad_values = row_major(x), torch.empty_like(values)
        native.block_linear_gradient(
            *arguments, m, grads.data_ptr(), grads.stride(0), x.data_ptr(), x.stride(0), grad_values.data_ptr(), threads
        )  # fmt: skip
    return grad_x, grad_values, sum_rows(grad_y) if needs[2] else None
