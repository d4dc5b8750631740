"""`masked_lora_linear` on a CPU. Beside the mask: the base product by whichever implementation `masked_linear` takes,
the low-rank half in csrc/lora_linear_group.cpp, as in `lora_linear`. Inside it: csrc/masked_linear.cpp, which adds
s B A to each row of W where it masks it, and strips of columns of (dYᵀ x) ⊙ M.

Forward + backward of 256 x 4096 x 1024, r = 16, half of W kept, on two threads of a busy AVX2 server, over what PyTorch
users write, with W ⊙ M and (W + s B A) ⊙ M in full: float32 0.64 to 0.83 beside the mask and 0.73 inside; bfloat16 with
16 rows 0.02 to 0.13 and 0.06 to 0.40. Extra memory 0 and 1/16 of W in place of 1.7 and 3 W.
"""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.kernels import _base
from peft_kernels.kernels._masked import strips, words_of_columns
from peft_kernels.kernels.composed._passes import drop, row_blocks, sum_rows
from peft_kernels.kernels.cpu import lora_linear, masked_linear
from peft_kernels.kernels.cpu.lora_linear import DTYPES, place
from peft_kernels.kernels.cpu.masked_linear import Operand, grad_product, masked_grad_weight, product
from peft_kernels.kernels.cpu.philox_dropout import row_major


def unsupported(problem) -> str | None:
    if problem.update_masked and problem.adapter_dtype not in DTYPES:
        return f"no adapters in {problem.adapter_dtype}"
    reason = masked_linear.unsupported(problem)
    return reason if problem.update_masked or reason is not None else lora_linear.unsupported(problem)


def unproven(problem) -> str | None:
    return masked_linear.unproven(problem) if problem.update_masked else lora_linear.unproven_beside(problem)


class _Update:
    """s B A as csrc takes it, with what keeps its memory alive."""

    def __init__(self, lora_A, lora_B, scaling: float) -> None:
        self.factors = a, b = row_major(lora_A), row_major(lora_B)
        self.arguments = (a.shape[0], _native.DTYPES[a.dtype], *place(a), *place(b), scaling)


def _operand(weight, words, clean, lora_A) -> Operand:
    """Never clean: the update is 0 nowhere."""
    return Operand(weight, words, False, lora_A.shape[1])


def forward(x, weight, words, clean, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked):
    if not update_masked:
        base = _base.MaskedWeight(weight, words, clean)
        return lora_linear.forward_beside(x, base, bias, lora_A, lora_B, scaling, dropout_p, seed)
    update, none = _Update(lora_A, lora_B, scaling), x.new_empty(x.shape[0], 0)
    if seed is None:
        return product(x, _operand(weight, words, clean, lora_A), update.arguments, bias), none
    y, alone = masked_linear.forward(x, weight, words, clean, bias), _operand(None, words, clean, lora_A)
    for block in row_blocks(*x.shape):
        y[block] += product(drop(x[block], dropout_p, seed, block.start), alone, update.arguments, None)
    return y, none


def backward(
    grad_y, x, s, weight, words, clean, lora_A, lora_B, scaling, dropout_p, seed, update_masked, needs
):  # fmt: skip
    need_x, need_bias, need_a, need_b = needs
    grad_bias = sum_rows(grad_y) if need_bias else None
    grad_x = grad_a = grad_b = None
    if not update_masked:
        if need_x or need_a or need_b:
            base = _base.MaskedWeight(weight, words, clean)
            grad_x, grad_a, grad_b = lora_linear.backward_beside(
                grad_y, x, s, base, lora_A, lora_B, scaling, dropout_p, seed, (need_x, need_a, need_b)
            )
        return grad_x, grad_bias, grad_a, grad_b
    if need_x:
        grad_x = _grad_x(grad_y, weight, words, clean, lora_A, lora_B, scaling, dropout_p, seed)
    if need_a or need_b:
        grad_a, grad_b = _grad_factors(grad_y, x, words, lora_A, lora_B, scaling, dropout_p, seed)
    return grad_x, grad_bias, grad_a if need_a else None, grad_b if need_b else None


def _grad_x(grad_y, weight, words, clean, lora_A, lora_B, scaling, dropout_p, seed):
    update = _Update(lora_A, lora_B, scaling)
    if seed is None:
        return grad_product(grad_y, _operand(weight, words, clean, lora_A), update.arguments)
    base = _base.MaskedWeight(weight, words, clean)
    grad_x, alone = _base.grad_input(grad_y, base), _operand(None, words, clean, lora_A)
    for block in row_blocks(*grad_x.shape):
        grad_x[block] += drop(grad_product(grad_y[block], alone, update.arguments), dropout_p, seed, block.start)
    return grad_x


def _grad_factors(grad_y, x, words, lora_A, lora_B, scaling, dropout_p, seed):
    """(dA, dB) = (s Bᵀ G, s G Aᵀ) with G = (dYᵀ drop(x)) ⊙ M, one strip of columns of G at a time, in float32."""
    (n, k), blocks = (lora_B.shape[0], lora_A.shape[1]), list(row_blocks(*x.shape))
    a, b = lora_A.float(), lora_B.float()
    grad_a, grad_b, scratch = torch.zeros_like(a), torch.zeros_like(b), torch.empty(0)
    for block in blocks:
        dropped = drop(x[block], dropout_p, seed, block.start)
        for start, stop in strips(k, n * 4, x.device):
            some = words_of_columns(words, start, stop)
            update = scratch.resize_(n, stop - start)
            masked_grad_weight(grad_y[block], dropped[:, start:stop], some, update)
            grad_a[:, start:stop].addmm_(b.t(), update, alpha=scaling)
            grad_b.addmm_(update, a[:, start:stop].t(), alpha=scaling)
    return grad_a.to(lora_A.dtype), grad_b.to(lora_B.dtype)
