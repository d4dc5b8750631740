"""`nf4_lora_linear` in fused Triton kernels: two launches forward, four backward, not counting the sums of partials.

Forward: S = drop(x) Aᵀ, then y as the 4-bit GEMM with an extra K step. Backward: dS, dX as a 4-bit GEMM with an extra K
step, dA and dB, as `lora_linear`, whose passes they are. Floor: `nf4_linear`'s and two passes over x, 15.6 us each at
M=8192, K=4096. Compiled and interpreted; never run on a GPU yet (docs/kernels.md).
"""

from __future__ import annotations

import torch

from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.reference.philox_dropout import scale
from peft_kernels.kernels.triton import _launch, _measured
from peft_kernels.kernels.triton.lora_linear import grad_s_and_b


def unsupported(problem) -> str | None:
    if problem.r > MAX_RANK:
        return f"rank {problem.r} is above {MAX_RANK}"
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype, problem.adapter_dtype)


def unproven(problem) -> str | None:
    return _measured.unproven("nf4_lora_linear", problem)


def forward(x, q, bias, lora_A, lora_B, scaling, dropout_p, seed):
    from peft_kernels.kernels.triton._down_projection import down_projection
    from peft_kernels.kernels.triton._nf4_gemm import nf4_gemm

    s = down_projection(x, lora_A.to(x.dtype), dropout_p, seed)
    return nf4_gemm(x, q, bias, s, lora_B.to(x.dtype), scaling), s


def backward(grad_y, x, s, q, lora_A, lora_B, scaling, dropout_p, seed, needs):
    """Gradients (dx, None, dbias, dA, dB); None also where `needs` says that nobody asked."""
    from peft_kernels.kernels.triton._nf4_grad_x import nf4_grad_x

    def grad_x_of(grad_s, a):
        return nf4_grad_x(grad_y, q, grad_s, a, scaling, dropout_p, seed)

    need_x, _, need_bias, need_a, need_b = needs
    wanted = (need_x, need_a, need_b)
    grad_x, grad_a, grad_b = gradients(grad_x_of, grad_y, x, s, lora_A, lora_B, scaling, dropout_p, seed, wanted)
    return grad_x, None, sum_rows(grad_y) if need_bias else None, grad_a, grad_b


def gradients(grad_x_of, grad_y, x, s, lora_A, lora_B, scaling, dropout_p, seed, needs):
    """(dx, dA, dB) of an adapter beside a base, whose `grad_x_of(dS, A)` is dX with the low-rank part; None where
    `needs` says that nobody asked."""
    from peft_kernels.kernels.triton._sum_over_rows import partial_sums

    need_x, need_a, need_b = needs
    a, b = lora_A.to(grad_y.dtype), lora_B.to(grad_y.dtype)
    grad_s, partials_b = grad_s_and_b(grad_y, s, b, need_x or need_a, need_b, seed is not None)
    grad_x = grad_x_of(grad_s, a) if need_x else None
    reduce = torch.ops.peft_kernels.splitk_reduce
    grad_a = grad_b = None
    if need_a:
        grad_a = reduce(partial_sums(grad_s, x, dropout_p, seed), scaling * scale(dropout_p), lora_A.dtype)
    if need_b:
        partials_b = partial_sums(s, grad_y, transposed=True) if partials_b is None else partials_b
        grad_b = reduce(partials_b, scaling, lora_B.dtype)
    return grad_x, grad_a, grad_b
