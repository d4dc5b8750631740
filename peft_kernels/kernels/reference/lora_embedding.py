"""Specification of y = W[ids] + s A[:, ids]ᵀ Bᵀ and of its gradients, in plain PyTorch.

ids [M], W [V, D], A [r, V], B [D, r]. Adapters of another dtype than W are cast to W's. Source: PEFT's
`lora.Embedding`.
"""

from __future__ import annotations

import torch


def unsupported(problem) -> str | None:
    return None


def forward(ids, weight, lora_A, lora_B, scaling):
    low_rank = lora_A.to(weight.dtype).t()[ids] @ lora_B.to(weight.dtype).t()
    return weight[ids] + scaling * low_rank


def backward(grad_y, ids, weight, lora_A, lora_B, scaling, padding_idx, needs):
    """Gradients (dW, dA, dB); None where `needs` says that nobody asked. padding_idx = -1: every row has one."""
    need_weight, need_a, need_b = needs
    wide = torch.promote_types(torch.float32, torch.promote_types(lora_A.dtype, grad_y.dtype))
    grad_y = grad_y.to(wide)
    grad_weight = grad_a = grad_b = None
    rows = grad_y.masked_fill((ids == padding_idx).unsqueeze(1), 0.0)
    if need_weight:
        total = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        grad_weight = total.index_add_(0, ids, rows).to(weight.dtype)
    if need_a:
        total = torch.zeros(lora_A.shape, dtype=wide, device=weight.device)
        grad_s = scaling * (rows @ lora_B.to(weight.dtype).to(wide))
        grad_a = total.index_add_(1, ids, grad_s.t()).to(lora_A.dtype)
    if need_b:
        s = lora_A.to(weight.dtype).t()[ids].to(wide)
        grad_b = (scaling * (grad_y.t() @ s)).to(lora_B.dtype)
    return grad_weight, grad_a, grad_b
