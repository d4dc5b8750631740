"""Specification of LoRA over a pruned weight: y = x (W ⊙ M)ᵀ + b + s drop(x) Δᵀ with Δ = B A, or (B A) ⊙ M where the
update is masked; and of its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peft_kernels.kernels.reference import lora_linear, mask_apply, philox_dropout
from peft_kernels.kernels.reference.masked_linear import masked


def unsupported(problem) -> str | None:
    return None


def _drop(x, p, seed):
    return x if seed is None else philox_dropout.forward(x, p, seed)


def _update(words, lora_A, lora_B, dtype):
    return mask_apply.forward(lora_B.to(dtype) @ lora_A.to(dtype), words, dtype)


def forward(x, weight, words, clean, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked):
    base = masked(weight, words, x.dtype)
    if not update_masked:
        return lora_linear.forward(x, base, bias, lora_A, lora_B, scaling, dropout_p, seed)
    update = _update(words, lora_A, lora_B, x.dtype)
    y = F.linear(x, base, bias) + scaling * F.linear(_drop(x, dropout_p, seed), update)
    return y, x.new_empty(x.shape[0], 0)


def backward(
    grad_y, x, s, weight, words, clean, lora_A, lora_B, scaling, dropout_p, seed, update_masked, needs
):  # fmt: skip
    """Gradients (dx, dbias, dA, dB); None where `needs` says that nobody asked."""
    need_x, need_bias, need_a, need_b = needs
    base = masked(weight, words, grad_y.dtype)
    if not update_masked:
        wanted = (need_x, False, need_bias, need_a, need_b)
        grad_x, _, *others = lora_linear.backward(
            grad_y, x, s, base, lora_A, lora_B, scaling, dropout_p, seed, wanted
        )  # fmt: skip
        return grad_x, *others
    grad_x = grad_bias = grad_a = grad_b = None
    if need_x:
        update = _update(words, lora_A, lora_B, grad_y.dtype)
        grad_x = grad_y @ base + _drop(scaling * (grad_y @ update), dropout_p, seed)
    if need_bias:
        grad_bias = grad_y.sum(0, dtype=torch.promote_types(torch.float32, grad_y.dtype))
    if need_a or need_b:
        wide = torch.promote_types(torch.float32, grad_y.dtype)
        grad_update = mask_apply.forward(grad_y.to(wide).t() @ _drop(x, dropout_p, seed).to(wide), words, wide)
        grad_a = (scaling * (lora_B.to(wide).t() @ grad_update)).to(lora_A.dtype) if need_a else None
        grad_b = (scaling * (grad_update @ lora_A.to(wide).t())).to(lora_B.dtype) if need_b else None
    return grad_x, grad_bias, grad_a, grad_b
