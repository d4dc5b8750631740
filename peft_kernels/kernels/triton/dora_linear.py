"""`dora_linear` in fused Triton kernels: `lora_linear`'s passes, one write more forward and one pass more backward.

Forward: S = drop(x) Aᵀ, then u and y from one GEMM (`_dora_gemm`). Backward: dU = dY ⊙ g with the sums for the
magnitude and the bias in one pass (`_grad_scale`), then `lora_linear`'s backward on dU.

Floor, M=8192, K=N=4096, r=16, bf16: forward 365-369 us as `lora_linear` (u is written under the GEMM), backward 47 us
more than its. Compiled for sm_80, sm_90 and sm_100, interpreted on the CPU; never run on a GPU yet (docs/kernels.md).
"""

from __future__ import annotations

from peft_kernels.kernels.triton import lora_linear
from peft_kernels.kernels.triton._launch import NOT_OF_4_BITS
from peft_kernels.kernels.triton._measured import unproven as _unproven


def unsupported(problem) -> str | None:
    return NOT_OF_4_BITS if problem.nf4 else lora_linear.unsupported(problem)


def unproven(problem) -> str | None:
    return _unproven("dora_linear", problem)


def forward(x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    from peft_kernels.kernels.triton._dora_gemm import dora_gemm
    from peft_kernels.kernels.triton._down_projection import down_projection

    s = down_projection(x, lora_A.to(x.dtype), dropout_p, seed)
    y, u = dora_gemm(x, weight.t(), s, lora_B.to(x.dtype).t(), scaling, bias, magnitude, weight_norm)
    return y, s, u


def backward(
    grad_y, x, s, u, weight, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
):  # fmt: skip
    """Gradients (dx, dW, dbias, dA, dB, dmagnitude); None where `needs` says that nobody asked."""
    from peft_kernels.kernels.triton._grad_scale import grad_scale

    need_x, need_weight, need_bias, need_a, need_b, need_magnitude = needs
    linear = (need_x, need_weight, False, need_a, need_b)
    grad_u, products, grad_bias = grad_scale(
        grad_y, u if need_magnitude else None, magnitude, weight_norm, scaled=any(linear), bias=need_bias
    )
    grad_x = grad_weight = grad_a = grad_b = grad_magnitude = None
    if grad_u is not None:
        grad_x, grad_weight, _, grad_a, grad_b = lora_linear.backward(
            grad_u, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, linear
        )
    if products is not None:
        grad_magnitude = (products / weight_norm).to(magnitude.dtype)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_magnitude
