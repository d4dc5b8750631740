"""Specification of y = x Wᵀ + b with W in NF4, and of dx = dY W: W is decoded to x's dtype with one rounding."""

from __future__ import annotations

import torch.nn.functional as F

from peft_kernels.kernels.reference import nf4_dequantize


def unsupported(problem) -> str | None:
    return None


def forward(x, q, bias):
    return F.linear(x, nf4_dequantize.forward(q), bias)


def backward(grad_y, q):
    return grad_y @ nf4_dequantize.forward(q)
