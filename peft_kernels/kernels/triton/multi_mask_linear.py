"""`multi_mask_linear` in Triton kernels that find the rows of each mask on the GPU: the host reads no id, so that the
op can be captured in a CUDA graph, as `composed` cannot.

Forward, few rows in 16 bits: one launch that reads W once for 16 rows, whatever their masks (`_multi_mask_decode`).
Else rows are sorted by mask, and each of y and dx is one grouped GEMM (`_multi_mask_gemm`), dW one launch
(`_multi_mask_grad_weight`).

Floor, M=8192, K=N=4096, bf16: 348 us each, as dense; 16 rows of 16 masks: 16 us of memory, 30 us of issue slots.
Compiled for sm_80 and sm_90 and interpreted on the CPU; never run on a GPU yet (docs/kernels_sparse.md).
"""

from __future__ import annotations

from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.triton import _launch, _measured

# Up to so many rows, and so many for each mask on average, one row after another costs less than a tile for each mask:
# 1.9 us against 6.1 us (`_multi_mask_decode`).
MOST_DECODED, MOST_DECODED_EACH = 64, 4


def unsupported(problem) -> str | None:
    if problem.m >= 1 << 31:
        return "2^31 or more rows"
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype, problem.weight_dtype)


def unproven(problem) -> str | None:
    return _measured.unproven("multi_mask_linear", problem)


def forward(x, weight, words, ids, bias):
    from peft_kernels.kernels.triton._multi_mask_decode import multi_mask_decode
    from peft_kernels.kernels.triton._multi_mask_gemm import multi_mask_gemm

    most = min(MOST_DECODED, MOST_DECODED_EACH * (words.shape[0] + 1))
    if x.dtype.itemsize == 2 and x.shape[0] <= most:
        return multi_mask_decode(x, weight, words, ids, bias)
    return multi_mask_gemm(x, weight, words, _places(words, ids), bias, by_rows=False)


def backward(grad_y, x, weight, words, ids, needs):
    """Gradients (dx, dW, dbias); None where `needs` says that nobody asked."""
    from peft_kernels.kernels.triton._multi_mask_gemm import multi_mask_gemm
    from peft_kernels.kernels.triton._multi_mask_grad_weight import multi_mask_grad_weight

    need_x, need_weight, need_bias = needs
    places = _places(words, ids) if need_x or need_weight else None
    return (
        multi_mask_gemm(grad_y, weight, words, places, by_rows=True) if need_x else None,
        multi_mask_grad_weight(grad_y, x, words, places, weight.dtype) if need_weight else None,
        sum_rows(grad_y) if need_bias else None,
    )


def _places(words, ids):
    from peft_kernels.kernels.triton._multi_rows import SortedPlaces

    return SortedPlaces(ids.unsqueeze(1), words.shape[0])
