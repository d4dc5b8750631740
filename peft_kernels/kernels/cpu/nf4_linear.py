"""`nf4_linear` on a CPU: csrc/nf4_linear.cpp.

CPU time in ms of one thread of an AVX2 server (PyTorch 2.13 with MKL, the machine busy with other work), 4096 x 4096,
beside PyTorch's matmul on a dense float32 weight:

    M                            1     4    16    17    64   128   240   480   1024
    forward                    2.0   3.5   9.4    18    31    60   117   298    500
    forward, float32 F.linear                     39    61    85   141   226    492
    dx                         3.9   5.8  10.5    16    34    62   114   241    560
    dx, float32 torch.mm                          26    64    82   125   230    475

In 16 bits it takes as long, while PyTorch on a processor without 16-bit matrix instructions takes many times as long as
in float32: 28 ms at M = 16 for `F.linear` in bfloat16 and 1936 ms for `dY @ W`, on two threads.
"""

from __future__ import annotations

import functools

import torch

from peft_kernels import _native
from peft_kernels.kernels.cpu import nf4_dequantize
from peft_kernels.kernels.cpu.lora_linear import place
from peft_kernels.kernels.cpu.nf4_dequantize import arguments, contiguous
from peft_kernels.kernels.cpu.philox_dropout import row_major

# Of PyTorch's names for what a processor can do, those of matrix instructions that its matmuls use.
_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def unsupported(problem) -> str | None:
    return nf4_dequantize.unsupported(problem)


@functools.cache
def matrix_instructions(dtype: torch.dtype) -> tuple[str, ...]:
    """The matrix instructions of this processor for a dtype."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return tuple(name for name in _INSTRUCTIONS.get(dtype, ()) if capabilities.get(name))


def unproven(problem) -> str | None:
    if problem.m > 16 and (names := matrix_instructions(problem.dtype)):
        return f"PyTorch's {problem.dtype} matmuls use this processor's {' and '.join(names)}"
    if problem.m > 256 and problem.dtype == torch.float32:
        return "PyTorch's float32 matmuls on decoded weights are faster above 256 rows"
    return None


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
