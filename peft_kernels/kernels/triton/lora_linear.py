"""`lora_linear` in fused Triton kernels, at most four passes over the big tensors.

Forward: S = drop(x) Aᵀ (one pass over x), then y as one GEMM with an extra K step. Backward: dS and dB from one pass
over dY, dX as one GEMM with an extra K step, dA in one pass over x. dW and dbias, rarely wanted, are PyTorch's matmul
and sum.

Floor, M=8192, K=N=4096, r=16, bf16: forward 365-369 us, backward 381-385 us, of which the frozen layer's GEMM is 348
each. Compiled for sm_80, sm_90 and sm_100 and interpreted on the CPU; never run on a GPU yet (docs/kernels.md).
"""

from __future__ import annotations

import torch

from peft_kernels import tuning
from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels.triton import _launch


def unsupported(problem) -> str | None:
    if problem.r > MAX_RANK:
        return f"rank {problem.r} is above {MAX_RANK}"
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype, problem.adapter_dtype)


def unproven(problem) -> str | None:
    if _launch.INTERPRETED:
        return _launch.INTERPRETER_IS_FOR_TESTS
    arch = _launch.architecture(torch.device(problem.device, problem.device_index))
    if tuning.measured_win(arch, "lora_linear", problem) is None:
        return f"no measurement in tuning/{arch}.json says that it beats composed at this shape"
    return None


def forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    from peft_kernels.kernels.triton._down_projection import down_projection
    from peft_kernels.kernels.triton._extended_gemm import extended_gemm

    s = down_projection(x, lora_A.to(x.dtype), dropout_p, seed)
    return extended_gemm(x, weight.t(), s, lora_B.to(x.dtype).t(), scaling, bias), s


def backward(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    """Gradients (dx, dW, dbias, dA, dB); None where `needs` says that nobody asked."""
    from peft_kernels.kernels.triton._extended_gemm import extended_gemm
    from peft_kernels.kernels.triton._sum_over_rows import sum_over_rows

    need_x, need_weight, need_bias, need_a, need_b = needs
    grad_s, grad_b = _grad_s_and_b(grad_y, s, lora_B, scaling, need_x or need_a, need_b)
    grad_x = grad_a = None
    if need_x:
        grad_x = extended_gemm(grad_y, weight, grad_s, lora_A.to(grad_y.dtype), scaling, None, dropout_p, seed)
    if need_a:
        grad_a = sum_over_rows(grad_s, x, scaling, lora_A.dtype, dropout_p, seed)
    grad_weight = torch.mm(grad_y.t(), x) if need_weight else None
    grad_bias = grad_y.sum(0, dtype=torch.promote_types(torch.float32, grad_y.dtype)) if need_bias else None
    return grad_x, grad_weight, grad_bias, grad_a, grad_b


def _grad_s_and_b(grad_y, s, lora_B, scaling, need_s, need_b):
    """dS [M, r], not yet multiplied by scaling, and dB [N, r]: together where one pass over dY serves both."""
    from peft_kernels.kernels.triton._down_projection import down_projection
    from peft_kernels.kernels.triton._grad_s_b import grad_s_b
    from peft_kernels.kernels.triton._sum_over_rows import sum_over_rows

    b = lora_B.to(grad_y.dtype)
    if need_s and need_b:
        both = grad_s_b(grad_y, s, b, scaling, lora_B.dtype)
        if both is not None:
            return both
    grad_s = down_projection(grad_y, b.t()) if need_s else None
    grad_b = sum_over_rows(s, grad_y, scaling, lora_B.dtype, transposed=True) if need_b else None
    return grad_s, grad_b
