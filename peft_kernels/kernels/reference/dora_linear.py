"""Specification of y = g ⊙ u + b with u = x Wᵀ + s (drop(x) Aᵀ) Bᵀ and g = magnitude / weight_norm, in plain PyTorch.

x [M, K], W [N, K], A [r, K], B [N, r], magnitude, weight_norm and b [N]. weight_norm, the row norms of W + s B A,
counts as a constant. W in NF4 is decoded. Source: Liu et al., "DoRA: Weight-Decomposed
Low-Rank Adaptation", 2024, equations 5 and 11.
"""

from __future__ import annotations

import torch

from peft_kernels.kernels.reference import lora_linear, nf4_dequantize


def unsupported(problem) -> str | None:
    return None


def forward(x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    u, s = lora_linear.forward(x, nf4_dequantize.dense(weight), None, lora_A, lora_B, scaling, dropout_p, seed)
    y = u * (magnitude / weight_norm)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), s, u


def backward(
    grad_y, x, s, u, weight, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
):  # fmt: skip
    """Gradients (dx, dW, dbias, dA, dB, dmagnitude); None where `needs` says that nobody asked."""
    need_x, need_weight, need_bias, need_a, need_b, need_magnitude = needs
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    grad_u = (grad_y * (magnitude / weight_norm)).to(grad_y.dtype)
    linear = (need_x, need_weight, False, need_a, need_b)
    grad_x, grad_weight, _, grad_a, grad_b = lora_linear.backward(
        grad_u, x, s, nf4_dequantize.dense(weight), lora_A, lora_B, scaling, dropout_p, seed, linear
    )
    grad_bias = grad_y.sum(0, dtype=wide) if need_bias else None
    grad_magnitude = None
    if need_magnitude:
        grad_magnitude = ((grad_y.to(wide) * u.to(wide)).sum(0) / weight_norm).to(magnitude.dtype)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_magnitude
