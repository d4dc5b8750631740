"""`sparse_linear` over whole blocks in one Triton launch for each of y, dx and dW: empty blocks take no time.

Compiled for sm_80 and sm_90 and interpreted on the CPU; never run on a GPU yet, so that none is taken by default.
"""

from __future__ import annotations

from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.triton import _launch, _measured


def unsupported(problem) -> str | None:
    if problem.layout != "block":
        return f"computes with whole blocks, not with layout {problem.layout!r}"
    if problem.weight_dtype != problem.dtype:
        return f"multiplies {problem.dtype} with a weight of the same dtype, not of {problem.weight_dtype}"
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype)


def unproven(problem) -> str | None:
    return _measured.unproven("sparse_linear", problem)


def forward(x, weight, bias):
    from peft_kernels.kernels.triton._block_gemm import block_rows_gemm

    return block_rows_gemm(x, weight, bias)


def backward(grad_y, x, weight, needs):
    """Gradients (dx, dvalues, dbias); None where `needs` says that nobody asked."""
    from peft_kernels.kernels.triton._block_gemm import block_columns_gemm
    from peft_kernels.kernels.triton._block_grad_values import block_grad_values

    return (
        block_columns_gemm(grad_y, weight) if needs[0] else None,
        block_grad_values(grad_y, x, weight) if needs[1] else None,
        sum_rows(grad_y) if needs[2] else None,
    )
