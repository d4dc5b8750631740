"""`lora_linear` on a CPU: the base matmuls stay in PyTorch, the low-rank half runs in csrc/lora_linear_group.cpp;
layers of a few thousand multiplications are one call into csrc/lora_linear.cpp, base matmul included.

What the low-rank half costs, forward and backward, as a part of what the `composed` form of it costs (one thread of an
AVX2 server, PyTorch 2.13 with MKL; CPU time of whole layers in turn, less that of the base matmuls alone, medians,
while the machine was busy with other work):

    M x K x N               r     float32   float32, dropout 0.1   16-bit, p = 0
    512 x 1024 x 1024       2     0.36
    512 x 1024 x 1024       4     0.45
    512 x 1024 x 1024       8     0.40
    512 x 1024 x 1024      16     0.82      0.63
    512 x 1024 x 1024      32     0.92
    512 x 1024 x 1024      64     0.90      0.83
    512 x 1024 x 1024     128     1.08      1.07
    256 x 1024 x 1024      16     0.82
    2000 x 384 x 1536      16     0.98
    256 x 384 x 384        16     1.07
    128 x 384 x 384         4     0.81
    64 x 384 x 384          8     0.98                             (r = 16) 0.16
    16 x 384 x 384          8     1.19      (r = 16) 0.31          (r = 16) 0.27

MKL's products are slow where one side is below 16; PyTorch's 16-bit ones are slow on a processor without 16-bit matrix
instructions; dropout in registers always saves passes. On few rows packing A and B costs as much as it saves. Of the
whole layer with its base matmuls the low-rank half is 5 to 30 %.

Whole small layers, forward and backward, over `composed`: 0.40 (4 x 16 x 16, r = 4), 0.53 (16 x 32 x 32, r = 8), 0.64
(16 x 64 x 64, r = 8), 0.75 (32 x 64 x 64, r = 16); with dropout 0.06 to 0.13.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels import _base
from peft_kernels.kernels.composed import lora_linear as composed
from peft_kernels.kernels.cpu.philox_dropout import dropout_arguments, row_major

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; x is on {problem.device}"
    if problem.dtype not in DTYPES or problem.adapter_dtype not in DTYPES:
        return f"no {problem.dtype} with adapters in {problem.adapter_dtype}"
    if problem.m == 0 or problem.n == 0 or problem.k == 0:
        return "nothing to compute"
    if problem.r > MAX_RANK:
        return f"rank {problem.r} is above {MAX_RANK}"
    return _native.why_not("_cpu")


def unproven(problem) -> str | None:
    if is_small(problem.m, problem.n, problem.k, problem.r):
        return None
    return unproven_beside(problem)


def unproven_beside(problem) -> str | None:
    """Why the low-rank half beside a base product is not taken."""
    if problem.r > 64:
        return "PyTorch's matmuls are faster above rank 64"
    if problem.dropout or problem.dtype != torch.float32:
        return None
    if problem.m < 64:
        return "PyTorch's matmuls are as fast below 64 rows without dropout"
    if problem.r >= 16 and problem.m * (problem.n + problem.k) < 1 << 19:
        return "PyTorch's matmuls are as fast on so few elements from rank 16 on, without dropout"
    return None


def is_small(m: int, n: int, k: int, r: int) -> bool:
    """Whether the whole layer is one call into csrc, because calling PyTorch's matmuls would take most of the time."""
    return m * n * k <= 131072 and n * k <= 4096 and r <= 64


def forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    (m, k), (n, r) = x.shape, lora_B.shape
    if is_small(m, n, k, r):
        return _small_forward(m, n, k, r, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return forward_beside(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def forward_beside(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    """The base product, dense or of 4 bits, then the low-rank half in csrc into its result."""
    (m, k), (n, r) = x.shape, lora_B.shape
    y = _base.linear(x, weight, bias)
    x, a, b = row_major(x), row_major(lora_A), row_major(lora_B)
    s = torch.empty(m, r, dtype=x.dtype)
    _native.load("_cpu").lora_forward(
        m, n, k, r, _native.DTYPES[x.dtype], _native.DTYPES[a.dtype], x.data_ptr(), x.stride(0), y.data_ptr(),
        s.data_ptr(), a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), scaling,
        *dropout_arguments(dropout_p, seed), torch.get_num_threads(),
    )  # fmt: skip
    return y, s


def _small_forward(m, n, k, r, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    x, weight, a, b = x.contiguous(), weight.contiguous(), lora_A.contiguous(), lora_B.contiguous()
    bias_ptr = 0 if bias is None else (bias := bias.contiguous()).data_ptr()
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    _native.load("_cpu").lora_small_forward(
        m, n, k, r, _native.DTYPES[x.dtype], _native.DTYPES[a.dtype], x.data_ptr(), weight.data_ptr(), bias_ptr,
        y.data_ptr(), s.data_ptr(), a.data_ptr(), b.data_ptr(), scaling, *dropout_arguments(dropout_p, seed),
    )  # fmt: skip
    return y, s


def place(tensor: Tensor | None) -> tuple[int, int]:
    """Address and row stride, as csrc takes them; a null pointer for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def backward(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    need_x, need_weight, need_bias, need_a, need_b = needs
    (m, n), (r, k) = grad_y.shape, lora_A.shape
    grad_weight = grad_bias = None
    if need_weight or need_bias:
        others = (False, need_weight, need_bias, False, False)
        _, grad_weight, grad_bias, _, _ = composed.backward(
            grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, others
        )
    if not (need_x or need_a or need_b):
        return None, grad_weight, grad_bias, None, None
    wanted = (need_x, need_a, need_b)
    low_rank = _small_backward if is_small(m, n, k, r) else backward_beside
    grad_x, grad_a, grad_b = low_rank(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, wanted)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b


def _wanted(x, s, lora_A, lora_B, need_a, need_b):
    """(x, s, dA, dB). What a wanted gradient does not read may be None: csrc takes a null pointer for it."""
    grad_a = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if need_a else None
    grad_b = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if need_b else None
    return x if need_a else None, s if need_b else None, grad_a, grad_b


def backward_beside(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    """(dx, dA, dB): the base product, dense or of 4 bits, and the low-rank half in csrc."""
    (need_x, need_a, need_b), (m, n), (r, k) = needs, grad_y.shape, lora_A.shape
    x, s, grad_a, grad_b = _wanted(x, s, lora_A, lora_B, need_a, need_b)
    grad_x = _base.grad_input(grad_y, weight) if need_x else None
    grad_y, a, b = row_major(grad_y), row_major(lora_A), row_major(lora_B)
    x, s = x if x is None else row_major(x), s if s is None else row_major(s)
    _native.load("_cpu").lora_backward(
        m, n, k, r, _native.DTYPES[grad_y.dtype], _native.DTYPES[a.dtype], *place(grad_y), *place(x), *place(s),
        *place(a), *place(b), scaling, *dropout_arguments(dropout_p, seed), place(grad_x)[0], place(grad_a)[0],
        place(grad_b)[0], torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_a, grad_b


def _small_backward(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    (need_x, need_a, need_b), (m, n), (r, k) = needs, grad_y.shape, lora_A.shape
    x, s, grad_a, grad_b = _wanted(x, s, lora_A, lora_B, need_a, need_b)
    grad_x = grad_y.new_empty(m, k) if need_x else None
    # Held by name until the call is over: a copy that only its address refers to could be freed before.
    grad_y, weight, a, b = grad_y.contiguous(), weight.contiguous(), lora_A.contiguous(), lora_B.contiguous()
    x_ptr = 0 if x is None else (x := x.contiguous()).data_ptr()
    s_ptr = 0 if s is None else (s := s.contiguous()).data_ptr()
    _native.load("_cpu").lora_small_backward(
        m, n, k, r, _native.DTYPES[grad_y.dtype], _native.DTYPES[a.dtype], grad_y.data_ptr(), x_ptr, s_ptr,
        weight.data_ptr(), a.data_ptr(), b.data_ptr(), scaling, *dropout_arguments(dropout_p, seed),
        0 if grad_x is None else grad_x.data_ptr(), 0 if grad_a is None else grad_a.data_ptr(),
        0 if grad_b is None else grad_b.data_ptr(),
    )  # fmt: skip
    return grad_x, grad_a, grad_b
