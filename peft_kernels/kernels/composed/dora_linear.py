"""`dora_linear` in the fewest PyTorch passes: `lora_linear`, and one pass more over its result each way.

Beside what `composed.lora_linear` does, forward reads u and writes y; backward reads dY and writes dY ⊙ g, and reads
dY and u for the gradient of the magnitude. PEFT 0.21 runs 16 kernels each way without dropout, and a second base matmul
with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.kernels.composed import lora_linear
from peft_kernels.kernels.composed._passes import row_blocks, sum_rows


def unsupported(problem) -> str | None:
    return None


def forward(x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    u, s = lora_linear.forward(x, weight, None, lora_A, lora_B, scaling, dropout_p, seed)
    g = magnitude / weight_norm
    # Computed in g's dtype, float32 or wider, and rounded once, into `out`.
    y = torch.empty_like(u)
    if bias is None:
        torch.mul(u, g, out=y)
    else:
        torch.addcmul(bias.to(g.dtype), u, g, out=y)
    return y, s, u


def backward(
    grad_y, x, s, u, weight, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
):  # fmt: skip
    need_x, need_weight, need_bias, need_a, need_b, need_magnitude = needs
    grads: tuple[Tensor | None, ...] = (None,) * 5
    linear = (need_x, need_weight, False, need_a, need_b)
    if any(linear):
        grad_u = torch.mul(grad_y, magnitude / weight_norm, out=torch.empty_like(grad_y))
        grads = lora_linear.backward(grad_u, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, linear)
    grad_x, grad_weight, _, grad_a, grad_b = grads
    grad_bias = sum_rows(grad_y) if need_bias else None
    grad_magnitude = None
    if need_magnitude:
        grad_magnitude = _sum_of_products(grad_y, u).div_(weight_norm).to(magnitude.dtype)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_magnitude


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over rows of left ⊙ right [N], in at least float32."""
    wide = torch.promote_types(torch.float32, left.dtype)
    total = torch.zeros(left.shape[1], dtype=wide, device=left.device)
    for block in row_blocks(*left.shape):
        total += (left[block].to(wide) * right[block].to(wide)).sum(0)
    return total
