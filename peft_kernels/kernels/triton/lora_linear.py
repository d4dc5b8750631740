"""`lora_linear` in fused Triton kernels: two launches forward, four backward, not counting the sums of partials.

Forward: S = drop(x) Aᵀ (one pass over x), then y as one GEMM with an extra K step; for a few rows both in one pass.
Backward: dS, dX as one GEMM with an extra K step, dA in one pass over x, dB in one over dY (or with dS, where that pass
could not run under the GEMM). On sm_90 the passes run beside the GEMMs. dW and dbias, rarely wanted, are PyTorch's
matmul and sum.

Floor, M=8192, K=N=4096, r=16, bf16: 349 us forward and backward each, passes hidden; 365-369 and 381-385 us one after
another; the frozen layer's GEMM is 348. Compiled for sm_80, sm_90 and sm_100 and interpreted on the CPU; never run on a
GPU yet (docs/kernels.md).
"""

from __future__ import annotations

import torch

from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels.reference.philox_dropout import scale
from peft_kernels.kernels.triton import _launch, _measured


def unsupported(problem) -> str | None:
    if problem.r > MAX_RANK:
        return f"rank {problem.r} is above {MAX_RANK}"
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype, problem.adapter_dtype)


def unproven(problem) -> str | None:
    return _measured.unproven("lora_linear", problem)


def forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    from peft_kernels.kernels.triton._down_projection import down_projection
    from peft_kernels.kernels.triton._extended_gemm import extended_gemm
    from peft_kernels.kernels.triton._single_pass import single_pass

    # Cast before S: nothing may be launched between S and the GEMM that overlaps it.
    a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
    both = single_pass(x, weight, bias, a, b, scaling) if seed is None else None
    if both is not None:
        return both
    s = down_projection(x, a, dropout_p, seed)
    return extended_gemm(x, weight.t(), s, b.t(), scaling, bias, overlap=True), s


def backward(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    """Gradients (dx, dW, dbias, dA, dB); None where `needs` says that nobody asked."""
    from peft_kernels.kernels.triton._extended_gemm import extended_gemm
    from peft_kernels.kernels.triton._sum_over_rows import partial_sums

    need_x, need_weight, need_bias, need_a, need_b = needs
    # Both live until the end: the passes for dA and dB may run beside the GEMM, and must not be given what it reads.
    a, b = lora_A.to(grad_y.dtype), lora_B.to(grad_y.dtype)
    grad_s, partials_b = grad_s_and_b(grad_y, s, b, need_x or need_a, need_b, seed is not None)
    grad_x = partials_a = None
    if need_x:
        grad_x = extended_gemm(grad_y, weight, grad_s, a, scaling, None, dropout_p, seed, overlap=True)
    if need_a:
        partials_a = partial_sums(grad_s, x, dropout_p, seed, overlap=need_x)
    if need_b and partials_b is None:
        partials_b = partial_sums(s, grad_y, transposed=True, overlap=need_x)
    # Only now, because each pass that runs beside the GEMM must follow it directly.
    reduce = torch.ops.peft_kernels.splitk_reduce
    grad_a = reduce(partials_a, scaling * scale(dropout_p), lora_A.dtype) if need_a else None
    grad_b = reduce(partials_b, scaling, lora_B.dtype) if need_b else None
    grad_weight = torch.mm(grad_y.t(), x) if need_weight else None
    grad_bias = grad_y.sum(0, dtype=torch.promote_types(torch.float32, grad_y.dtype)) if need_bias else None
    return grad_x, grad_weight, grad_bias, grad_a, grad_b


def grad_s_and_b(grad_y, s, b, need_s, need_b, dropout):
    """dS [M, r], not yet multiplied by scaling, and the partials of dB where one pass over dY serves both, else None.
    The last launch is the one that writes dS."""
    from peft_kernels.kernels.triton._down_projection import down_projection
    from peft_kernels.kernels.triton._grad_s_b import grad_s_b

    if not need_s:
        return None, None
    both = grad_s_b(grad_y, s, b, dropout=dropout) if need_b else None
    return both if both is not None else (down_projection(grad_y, b.t()), None)
