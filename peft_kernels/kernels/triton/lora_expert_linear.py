"""`lora_expert_linear` in fused Triton kernels that find the rows of each expert on the GPU: the host reads nothing
back, so that the op can be captured in a CUDA graph, as `composed` cannot.

Forward: S = drop(x) A_eᵀ, then y as one grouped GEMM with an extra K step. Backward: dS, dX as one such GEMM, dA and dB
by walking the rows of each expert. dW and dbias, rarely wanted, are the same walk.

Floor, M=8192, K=2048, N=1408, 64 experts, r=16, bf16: forward 108 us, backward 122 us, of which the weights of the
experts are 86 each. Compiled for sm_80, sm_90 and sm_100 and interpreted on the CPU; never run on a GPU yet
(docs/kernels.md).
"""

from __future__ import annotations

import torch

from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._launch import NOT_OF_4_BITS
from peft_kernels.kernels.triton._measured import unproven as _unproven


def unsupported(problem) -> str | None:
    if problem.nf4:
        return NOT_OF_4_BITS
    if problem.r > MAX_RANK:
        return f"rank {problem.r} is above {MAX_RANK}"
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype, problem.adapter_dtype)


def unproven(problem) -> str | None:
    return _unproven("lora_expert_linear", problem)


def forward(x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
    from peft_kernels.kernels.triton._expert_down_projection import expert_down_projection
    from peft_kernels.kernels.triton._expert_gemm import expert_gemm

    a, b, offsets = lora_A.to(x.dtype), lora_B.to(x.dtype), offsets.contiguous()
    s = expert_down_projection(x, a, offsets, dropout_p, seed)
    return expert_gemm(x, weight.transpose(1, 2), s, b.transpose(1, 2), offsets, scaling, bias), s


def backward(grad_y, x, s, weight, lora_A, lora_B, offsets, scaling, dropout_p, seed, needs):
    """Gradients (dx, dW, dbias, dA, dB); None where `needs` says that nobody asked."""
    from peft_kernels.kernels.triton._expert_down_projection import expert_down_projection
    from peft_kernels.kernels.triton._expert_gemm import expert_gemm
    from peft_kernels.kernels.triton._expert_sum_over_rows import expert_sum_over_rows

    need_x, need_weight, need_bias, need_a, need_b = needs
    a, b, offsets = lora_A.to(grad_y.dtype), lora_B.to(grad_y.dtype), offsets.contiguous()
    grad_x = grad_weight = grad_bias = grad_a = grad_b = None
    # dS is not yet multiplied by scaling.
    grad_s = expert_down_projection(grad_y, b.transpose(1, 2), offsets) if need_x or need_a else None
    if need_x:
        grad_x = expert_gemm(grad_y, weight, grad_s, a, offsets, scaling, None, dropout_p, seed)
    if need_a:
        grad_a = expert_sum_over_rows(grad_s, x, offsets, scaling, lora_A.dtype, dropout_p, seed)
    if need_b:
        grad_b = expert_sum_over_rows(s, grad_y, offsets, scaling, lora_B.dtype, transposed=True)
    if need_weight:
        grad_weight = expert_sum_over_rows(grad_y, x, offsets, 1.0, weight.dtype)
    if need_bias:
        one = grad_y.new_ones(1, 1).expand(grad_y.shape[0], 1)
        # Products with 1, exact unless TF32 rounds the other factor.
        grad_bias = expert_sum_over_rows(one, grad_y, offsets, 1.0, torch.float32, precision="ieee").squeeze(1)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b
