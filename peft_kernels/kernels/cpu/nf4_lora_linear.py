"""`nf4_lora_linear` on a CPU: the base product by whichever implementation `nf4_linear` takes, the low-rank half in
csrc/lora_linear_group.cpp, as in `lora_linear`."""

from __future__ import annotations

from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.cpu import lora_linear


def unsupported(problem) -> str | None:
    return lora_linear.unsupported(problem)


def unproven(problem) -> str | None:
    return lora_linear.unproven_beside(problem)


def forward(x, q, bias, lora_A, lora_B, scaling, dropout_p, seed):
    return lora_linear.forward_beside(x, q, bias, lora_A, lora_B, scaling, dropout_p, seed)


def backward(grad_y, x, s, q, lora_A, lora_B, scaling, dropout_p, seed, needs):
    need_x, _, need_bias, need_a, need_b = needs
    grad_x = grad_a = grad_b = None
    if need_x or need_a or need_b:
        wanted = (need_x, need_a, need_b)
        grad_x, grad_a, grad_b = lora_linear.backward_beside(
            grad_y, x, s, q, lora_A, lora_B, scaling, dropout_p, seed, wanted
        )
    return grad_x, None, sum_rows(grad_y) if need_bias else None, grad_a, grad_b
