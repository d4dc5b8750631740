"""`sparse_linear` on a CPU in csrc, for layouts "block" (`_block`) and "csr" (`_csr`)."""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.kernels.cpu import _block, _csr
from peft_kernels.kernels.cpu.nf4_linear import matrix_instructions

_BY_LAYOUT = {"block": _block, "csr": _csr}


def unsupported(problem) -> str | None:
    if problem.layout not in _BY_LAYOUT:
        return f"for layouts {' and '.join(map(repr, _BY_LAYOUT))}, not {problem.layout!r}"
    if problem.device != "cpu":
        return f"written for CPUs, not for {problem.device}"
    if problem.dtype == torch.float64:
        return "float64 runs in PyTorch"
    if problem.weight_dtype != problem.dtype:
        return f"multiplies {problem.dtype} with a weight of the same dtype, not of {problem.weight_dtype}"
    return _native.why_not("_cpu")


def unproven(problem) -> str | None:
    kernel = _BY_LAYOUT[problem.layout]
    if problem.m > kernel.ROWS_BELOW_MATRIX_UNITS and (names := matrix_instructions(problem.dtype)):
        return f"PyTorch's {problem.dtype} matmuls use this processor's {' and '.join(names)}"
    return kernel.unproven(problem)


def forward(x, weight, bias):
    return _BY_LAYOUT[weight.layout].forward(x, weight, bias)


def backward(grad_y, x, weight, needs):
    """Gradients (dx, dvalues, dbias); None where `needs` says that nobody asked."""
    return _BY_LAYOUT[weight.layout].backward(grad_y, x, weight, needs)
