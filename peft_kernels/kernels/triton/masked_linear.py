"""`masked_linear` in fused Triton kernels: one launch forward, one each for dx and for dW, dense or compact.

The mask is applied between memory and tensor cores (`_masked_gemm`), to dW in the epilogue (`_masked_grad_weight`), and
compact gradients are gathered there (`_grad_at`). A weight that is 0 outside the mask already goes into PyTorch's
matmul forward and for dx.

Floor, M=8192, K=N=4096, bf16: 348 us each, as dense. Compiled for sm_80, sm_90 and sm_100 and interpreted on the CPU;
never run on a GPU yet (docs/kernels_sparse.md).
"""

from __future__ import annotations

from peft_kernels.kernels.composed import masked_linear as composed
from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.triton import _launch, _measured


def unsupported(problem) -> str | None:
    if problem.weight_dtype is None:
        return "reads dense weights; over NF4 composed decodes pieces"
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype, problem.weight_dtype)


def unproven(problem) -> str | None:
    return _measured.unproven("masked_linear", problem)


def forward(x, weight, words, clean, bias):
    from peft_kernels.kernels.triton._masked_gemm import masked_gemm

    if clean:
        return composed.forward(x, weight, words, clean, bias)
    return masked_gemm(x, weight, words, bias, by_rows=False)


def backward(grad_y, x, weight, words, clean, places, values_dtype, needs):
    from peft_kernels.kernels.triton._grad_at import grad_at
    from peft_kernels.kernels.triton._masked_grad_weight import masked_grad_weight

    need_x, need_weight, need_bias, need_values = needs
    return (
        _grad_x(grad_y, weight, words, clean) if need_x else None,
        masked_grad_weight(grad_y, x, words, weight.dtype) if need_weight else None,
        sum_rows(grad_y) if need_bias else None,
        grad_at(grad_y, x, places, values_dtype) if need_values else None,
    )


def _grad_x(grad_y, weight, words, clean):
    from peft_kernels.kernels.triton._masked_gemm import masked_gemm

    if clean:
        return composed.backward(grad_y, None, weight, words, clean, None, None, (True, False, False, False))[0]
    return masked_gemm(grad_y, weight, words, by_rows=True)
