"""`masked_lora_linear` in fused Triton kernels (`_masked_lora_gemm`).

Beside the mask, as `lora_linear`, whose passes it shares: S, then y as the masked GEMM with the low-rank step first;
dS, dX likewise, dA and dB. A weight that is 0 outside the mask already goes into `lora_linear`'s kernels. Inside the
mask y and dX take one launch each, the update made tile by tile, and so do dA and dB up to rank 16
(`_masked_grad_factors`), above which their partials would be as large as W and `composed`'s strips serve.

Floor, M=8192, K=N=4096, r=16, bf16: beside 349 us forward and backward each; inside 392 us, and 392 + 348 backward.
Compiled for sm_80 and sm_90 and interpreted on the CPU; never run on a GPU yet (docs/kernels_sparse.md).
"""

from __future__ import annotations

from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels.composed import masked_lora_linear as composed
from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.triton import _launch, _measured, lora_linear
from peft_kernels.kernels.triton.nf4_lora_linear import gradients

# Of an update inside the mask: the product for a tile then takes half the time of the tile's own.
MOST_RANKS_INSIDE = 64
# Up to which the gradients of the factors come from one launch.
MOST_RANKS_OF_PARTIALS = 16


def unsupported(problem) -> str | None:
    most = MOST_RANKS_INSIDE if problem.update_masked else MAX_RANK
    if problem.weight_dtype is None:
        return "reads dense weights; over NF4 composed decodes pieces"
    if problem.r > most:
        return f"rank {problem.r} is above {most}"
    if problem.update_masked and problem.dropout:
        return "dropout gives an update inside the mask another x than the weight's: two products"
    dtypes = (problem.dtype, problem.weight_dtype, problem.adapter_dtype)
    return _launch.unavailable(problem.device, problem.device_index, *dtypes)


def unproven(problem) -> str | None:
    return _measured.unproven("masked_lora_linear", problem)


def _is_whole(weight, clean: bool, dtype) -> bool:
    """Whether the weight goes into `lora_linear` as it is."""
    return clean and weight.dtype == dtype


def forward(x, weight, words, clean, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked):
    from peft_kernels.kernels.triton._down_projection import down_projection
    from peft_kernels.kernels.triton._masked_lora_gemm import masked_lora_gemm, masked_update_gemm

    if update_masked:
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return masked_update_gemm(x, weight, words, a, b, scaling, bias, by_rows=False), x.new_empty(x.shape[0], 0)
    if _is_whole(weight, clean, x.dtype):
        return lora_linear.forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    s = down_projection(x, lora_A.to(x.dtype), dropout_p, seed)
    return masked_lora_gemm(x, weight, words, s, lora_B.to(x.dtype).t(), scaling, bias, by_rows=False), s


def backward(
    grad_y, x, s, weight, words, clean, lora_A, lora_B, scaling, dropout_p, seed, update_masked, needs
):  # fmt: skip
    """Gradients (dx, dbias, dA, dB); None where `needs` says that nobody asked."""
    from peft_kernels.kernels.triton._masked_lora_gemm import masked_lora_gemm, masked_update_gemm

    need_x, need_bias, need_a, need_b = needs
    if update_masked:
        a, b = lora_A.to(grad_y.dtype), lora_B.to(grad_y.dtype)
        grad_x = masked_update_gemm(grad_y, weight, words, a, b, scaling, by_rows=True) if need_x else None
        grads = _grad_factors(grad_y, x, weight, words, lora_A, lora_B, scaling, need_a, need_b)
        return grad_x, sum_rows(grad_y) if need_bias else None, *grads
    if _is_whole(weight, clean, grad_y.dtype):
        wanted = (need_x, False, need_bias, need_a, need_b)
        grads = lora_linear.backward(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, wanted)
        return grads[0], *grads[2:]

    def grad_x_of(grad_s, a):
        return masked_lora_gemm(
            grad_y, weight, words, grad_s, a, scaling, None, dropout_p, seed, by_rows=True
        )  # fmt: skip

    grad_x, grad_a, grad_b = gradients(
        grad_x_of, grad_y, x, s, lora_A, lora_B, scaling, dropout_p, seed, (need_x, need_a, need_b)
    )
    return grad_x, sum_rows(grad_y) if need_bias else None, grad_a, grad_b


def _grad_factors(grad_y, x, weight, words, lora_A, lora_B, scaling, need_a, need_b):
    """(dA, dB) of an update inside the mask."""
    from peft_kernels.kernels.triton._masked_grad_factors import masked_grad_factors

    if not need_a and not need_b:
        return None, None
    if lora_A.shape[0] > MOST_RANKS_OF_PARTIALS:
        return composed.backward(
            grad_y, x, None, weight, words, False, lora_A, lora_B, scaling, 0.0, None, True,
            (False, False, need_a, need_b),
        )[2:]  # fmt: skip
    grad_a, grad_b = masked_grad_factors(grad_y, x, words, lora_A, lora_B, scaling)
    return grad_a if need_a else None, grad_b if need_b else None
