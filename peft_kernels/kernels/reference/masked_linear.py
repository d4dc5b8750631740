"""Specification of y = x (W ⊙ M)ᵀ + b and of its gradients, in plain PyTorch.

x [M, K], W [N, K] dense or NF4, decoded to x's dtype; dW is 0 outside the mask, and compact at `places`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.reference import mask_apply, mask_unpack, nf4_dequantize


def unsupported(problem) -> str | None:
    return None


def masked(weight: Tensor | NF4Weight, words: Tensor, dtype: torch.dtype) -> Tensor:
    dense = nf4_dequantize.forward(weight) if isinstance(weight, NF4Weight) else weight
    return mask_apply.forward(dense, words, dtype)


def forward(x, weight, words, clean, bias):
    return F.linear(x, masked(weight, words, x.dtype), bias)


def backward(grad_y, x, weight, words, clean, places, values_dtype, needs):
    """Gradients (dx, dW, dbias, dvalues); None where `needs` says that nobody asked."""
    need_x, need_weight, need_bias, need_values = needs
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    grad_x = grad_y @ masked(weight, words, grad_y.dtype) if need_x else None
    grad_bias = grad_y.sum(0, dtype=wide) if need_bias else None
    grad_weight = grad_values = None
    if need_weight or need_values:
        whole = grad_y.to(wide).t() @ x.to(wide)
    if need_weight:
        kept = mask_unpack.forward(words, weight.shape[1])
        grad_weight = torch.where(kept, whole, 0.0).to(weight.dtype)
    if need_values:
        grad_values = whole.flatten()[places.flat.long()].to(values_dtype)
    return grad_x, grad_weight, grad_bias, grad_values
