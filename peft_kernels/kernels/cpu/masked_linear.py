"""`masked_linear` on a CPU: csrc/masked_linear.cpp, whose operands are masked and made floats in the L2 cache.

CPU time in ms of one thread of an AVX2 server (PyTorch 2.13 with MKL, the machine busy with other work: the fastest of
7), N = 1024, K = 4096, half of W kept, beside `composed` with csrc's masks and beside PyTorch's dense product:

    M                              1     4    16    64   256  1024       16  128
    dtype                                          float32             bfloat16
    y                            4.3   5.0   6.8    10    42   136      7.3   25
    y, composed                  5.4   7.7   8.6    13    43   155       18  121
    y, dense                     1.4   4.3   5.7   9.7    34   129       14  113
    dx                           3.5   4.6   6.3    12    34   154      5.7   23
    dx, composed                 9.1    10    12    20    39   167      131 1018
    dx, dense                    1.1   7.1   8.7    14    33   148      400 3420
    dW                                                                 8.7   24
    dW, composed                                                        37  260

A float32 dW is PyTorch's product with the mask put on it after, 3 ms for 16 MiB; csrc's took 1.1 to 1.3 times as long.
Forward + backward at M = 256 on two threads took 0.84 to 0.98 of the time of `torch.nn.utils.prune` (medians of pairs
in turn, eight runs of which six at most 0.88; dense 0.83 to 0.93; on one thread 0.93 to 1.0), and no memory but its
results and 0.41 MiB a thread.
"""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import STRIP
from peft_kernels.kernels import _base
from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.cpu import mask_apply
from peft_kernels.kernels.cpu.lora_linear import DTYPES, place
from peft_kernels.kernels.cpu.nf4_dequantize import arguments, contiguous
from peft_kernels.kernels.cpu.nf4_linear import matrix_instructions
from peft_kernels.kernels.cpu.philox_dropout import row_major

NO_UPDATE = (0, 0, 0, 0, 0, 0, 0.0)
NO_CHANGES = (0, False, 0, 1, 0)


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; x is on {problem.device}"
    if problem.dtype not in DTYPES or problem.weight_dtype not in (None, *DTYPES):
        return f"no {problem.dtype} with a weight in {problem.weight_dtype}"
    return _native.why_not("_cpu")


def unproven(problem) -> str | None:
    if problem.m > 16 and (names := matrix_instructions(problem.dtype)):
        return f"PyTorch's {problem.dtype} matmuls use this processor's {' and '.join(names)}"
    return None


class Operand:
    """A weight (None: zeros of the mask's shape) and its mask (None: all of it) as csrc takes them, and what keeps
    their memory alive. `changes`: (places, whether they are int64, where strips of so many rows begin, floats)."""

    def __init__(self, weight, words, clean: bool, columns: int, changes: tuple = NO_CHANGES) -> None:
        self.words = None if clean or words is None else row_major(words)
        dense, nf4 = (0, 0, 0), []
        self.weight = weight
        if isinstance(weight, NF4Weight):
            self.weight = weight = contiguous(weight)
            nf4 = list(arguments(weight))
        elif weight is not None:
            self.weight = weight = row_major(weight)
            dense = (_native.DTYPES[weight.dtype], *place(weight))
        self.shape = ((weight if words is None else words).shape[0], columns)
        self.arguments = (*self.shape, *dense, nf4, *place(self.words), changes)


def operand(weight, words, clean: bool) -> Operand:
    return Operand(weight, words, clean, weight.shape[1])


def is_plain(weight, clean: bool, dtype: torch.dtype) -> bool:
    """Whether the product is one without a mask, for which there is something faster."""
    return clean and (isinstance(weight, NF4Weight) or weight.dtype == dtype == torch.float32)


def forward(x, weight, words, clean, bias):
    if is_plain(weight, clean, x.dtype):
        return _base.linear(x, weight, bias)
    return product(x, operand(weight, words, clean), NO_UPDATE, bias)


def product(x, masked: Operand, update: tuple, bias):
    """x (W ⊙ M)ᵀ + b; of W + s B A with the update (rank, dtype, A, its row stride, B, its row stride, s)."""
    x, bias = row_major(x), None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], masked.shape[0], dtype=x.dtype)
    _native.load("_cpu").masked_linear_forward(
        x.shape[0], masked.arguments, update, _native.DTYPES[x.dtype], *place(x), place(bias)[0], y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def grad_product(grad_y, masked: Operand, update: tuple):
    """dY (W ⊙ M)."""
    grad_y = row_major(grad_y)
    grad_x = torch.empty(grad_y.shape[0], masked.shape[1], dtype=grad_y.dtype)
    _native.load("_cpu").masked_linear_grad_x(
        grad_y.shape[0], masked.arguments, update, _native.DTYPES[grad_y.dtype], *place(grad_y), grad_x.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_x


def backward(grad_y, x, weight, words, clean, places, values_dtype, needs):
    need_x, need_weight, need_bias, need_values = needs
    return (
        _grad_x(grad_y, weight, words, clean) if need_x else None,
        _grad_weight(grad_y, x, weight, words) if need_weight else None,
        sum_rows(grad_y) if need_bias else None,
        grad_values(grad_y, x, places, values_dtype) if need_values else None,
    )


def _grad_x(grad_y, weight, words, clean):
    if is_plain(weight, clean, grad_y.dtype):
        return _base.grad_input(grad_y, weight)
    return grad_product(grad_y, operand(weight, words, clean), NO_UPDATE)


def _grad_weight(grad_y, x, weight, words):
    out = torch.empty(weight.shape, dtype=weight.dtype)
    _native.load("_cpu").advise_huge_pages(out.data_ptr(), out.nbytes)
    return masked_grad_weight(grad_y, x, words, out)


def masked_grad_weight(grad_y, x, words, out):
    """out [N, K], contiguous, = (dYᵀ x) ⊙ M, rounded once."""
    if grad_y.dtype == out.dtype == torch.float32:
        torch.mm(grad_y.t(), x, out=out)
        mask_apply.forward_(out, words)
        return out
    grad_y, x, words = row_major(grad_y), row_major(x), row_major(words)
    _native.load("_cpu").masked_linear_grad_weight(
        x.shape[0], *out.shape, _native.DTYPES[x.dtype], *place(grad_y), *place(x), *place(words),
        _native.DTYPES[out.dtype], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def grad_values(grad_y, x, places, dtype):
    """(dYᵀ x) at the places, [nnz] in `dtype`, rounded once."""
    grad_y, x, flat, starts = row_major(grad_y), row_major(x), places.flat.contiguous(), places.starts.contiguous()
    values = torch.empty(flat.shape, dtype=dtype)
    _native.load("_cpu").masked_linear_grad_values(
        x.shape[0], *places.shape, _native.DTYPES[x.dtype], *place(grad_y), *place(x), flat.data_ptr(),
        flat.dtype == torch.int64, starts.data_ptr(), STRIP, _native.DTYPES[dtype], values.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return values
