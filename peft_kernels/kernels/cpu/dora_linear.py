"""`dora_linear` on a CPU: the low-rank half as in `cpu.lora_linear`, and csrc/dora_linear.cpp for the passes over u and
dY: one forward, y = g ⊙ u + b; one backward, for dY ⊙ g and the sums over rows of dY ⊙ u and of dY.

CPU time of forward and backward over that of `composed`, base matmuls included (one thread of an AVX2 server,
PyTorch 2.13; medians of runs in turn while the machine was busy with other work): 0.97 at 512 x 1024 x 1024, r = 16,
float32; 0.92 with dropout 0.05; 0.98 at r = 64; 0.95 at 1024 x 384 x 384; 1.02, 1.04 and 1.06 at 64, 16 and
4 x 384 x 384; 0.57 at 4 x 16 x 16, r = 4; 0.88 at 64 x 384 x 384 in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.cpu import lora_linear, nf4_lora_linear
from peft_kernels.kernels.cpu.lora_linear import place
from peft_kernels.kernels.cpu.philox_dropout import row_major


def unsupported(problem) -> str | None:
    return lora_linear.unsupported(problem)


def unproven(problem) -> str | None:
    if problem.r > 64:
        return "PyTorch's matmuls are faster above rank 64"
    one_call = not problem.nf4 and lora_linear.is_small(problem.m, problem.n, problem.k, problem.r)
    few = problem.m * (problem.n + problem.k) < 1 << 17 and not one_call
    if few and not problem.dropout and problem.dtype == torch.float32:
        return "PyTorch's matmuls are as fast on so few elements without dropout"
    return None


def _linear(weight):
    """The implementation of the layer without its magnitude."""
    return nf4_lora_linear if isinstance(weight, NF4Weight) else lora_linear


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()


def forward(x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    u, s = _linear(weight).forward(x, weight, None, lora_A, lora_B, scaling, dropout_p, seed)
    g, bias, y = _float(magnitude / weight_norm), _float(bias), torch.empty(u.shape, dtype=u.dtype)
    _native.load("_cpu").dora_scale(
        *u.shape, _native.DTYPES[u.dtype], u.data_ptr(), g.data_ptr(), place(bias)[0], y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, s, u


def backward(
    grad_y, x, s, u, weight, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
):  # fmt: skip
    need_x, need_weight, need_bias, need_a, need_b, need_magnitude = needs
    linear = (need_x, need_weight, False, need_a, need_b)
    grad_y, u = row_major(grad_y), row_major(u) if need_magnitude else None
    (m, n), g = grad_y.shape, _float(magnitude / weight_norm)
    grad_u = torch.empty(m, n, dtype=grad_y.dtype) if any(linear) else None
    products = torch.empty(n) if need_magnitude else None
    sums = torch.empty(n) if need_bias else None
    _native.load("_cpu").dora_backward(
        m, n, _native.DTYPES[grad_y.dtype], *place(grad_y), *place(u), g.data_ptr(), place(grad_u)[0],
        place(products)[0], place(sums)[0], torch.get_num_threads(),
    )  # fmt: skip
    grads: tuple[Tensor | None, ...] = (None,) * 5
    if grad_u is not None:
        grads = _linear(weight).backward(grad_u, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, linear)
    grad_x, grad_weight, _, grad_a, grad_b = grads
    grad_magnitude = None if products is None else products.div_(weight_norm).to(magnitude.dtype)
    return grad_x, grad_weight, sums, grad_a, grad_b, grad_magnitude
