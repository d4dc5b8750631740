"""Specification of y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ with W in NF4, and of its gradients: `lora_linear` on decoded W."""

from __future__ import annotations

from peft_kernels.kernels.reference import lora_linear, nf4_dequantize


def unsupported(problem) -> str | None:
    return None


def forward(x, q, bias, *others):
    return lora_linear.forward(x, nf4_dequantize.forward(q), bias, *others)


def backward(grad_y, x, s, q, *others):
    return lora_linear.backward(grad_y, x, s, nf4_dequantize.forward(q), *others)
