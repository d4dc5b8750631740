"""Specification of y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ and of its gradients, in plain PyTorch.

x [M, K], W [N, K], b [N], A [r, K], B [N, r]; S = drop(x) Aᵀ [M, r] is what forward leaves for backward.
Adapters of another dtype than x are cast to x's. Source: Hu et al., "LoRA", 2021, and PEFT's `lora.Linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.kernels.reference import philox_dropout


def unsupported(problem) -> str | None:
    return None


def _drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return philox_dropout.forward(x, p, seed) if seed is not None else x


def forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    s = F.linear(_drop(x, dropout_p, seed), lora_A.to(x.dtype))
    y = F.linear(x, weight, bias) + scaling * F.linear(s, lora_B.to(x.dtype))
    return y, s


def backward(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    """Gradients (dx, dW, dbias, dA, dB); None where `needs` says that nobody asked."""
    need_x, need_weight, need_bias, need_a, need_b = needs
    a, b = lora_A.to(grad_y.dtype), lora_B.to(grad_y.dtype)
    grad_s = scaling * (grad_y @ b)
    grad_x = grad_y @ weight + _drop(grad_s @ a, dropout_p, seed) if need_x else None
    grad_weight = grad_y.t() @ x if need_weight else None
    grad_bias = grad_y.sum(0, dtype=torch.promote_types(torch.float32, grad_y.dtype)) if need_bias else None
    # Sums over M are kept in float32 until the one rounding to the parameter's dtype.
    wide = torch.promote_types(lora_A.dtype, grad_y.dtype)
    grad_a = (grad_s.to(wide).t() @ _drop(x, dropout_p, seed).to(wide)).to(lora_A.dtype) if need_a else None
    wide = torch.promote_types(lora_B.dtype, grad_y.dtype)
    grad_b = (scaling * (grad_y.to(wide).t() @ s.to(wide))).to(lora_B.dtype) if need_b else None
    return grad_x, grad_weight, grad_bias, grad_a, grad_b
