"""Specification of y[m] = x[m] (W ⊙ M_i)ᵀ + b with i = ids[m] (the whole W where no mask has that number), and of its
gradients: every mask on all rows, of which it keeps its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peft_kernels.kernels.reference import mask_apply


def unsupported(problem) -> str | None:
    return None


def _each(weight, words, ids):
    """(rows [M, 1] that are of it, W ⊙ M in full) for the whole W and every mask."""
    count = words.shape[0]
    yield ((ids < 0) | (ids >= count)).unsqueeze(1), weight, None
    for i in range(count):
        yield (ids == i).unsqueeze(1), mask_apply.forward(weight, words[i], weight.dtype), words[i]


def forward(x, weight, words, ids, bias):
    y = x.new_zeros(x.shape[0], weight.shape[0])
    for own, masked, _ in _each(weight, words, ids):
        y = torch.where(own, F.linear(x, masked.to(x.dtype), bias), y)
    return y


def backward(grad_y, x, weight, words, ids, needs):
    """Gradients (dx, dW, dbias); None where `needs` says that nobody asked."""
    need_x, need_weight, need_bias = needs
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    grad_x, grad_weight = grad_y.new_zeros(grad_y.shape[0], weight.shape[1]), torch.zeros_like(weight, dtype=wide)
    for own, masked, mask in _each(weight, words, ids):
        if need_x:
            grad_x = torch.where(own, grad_y @ masked.to(grad_y.dtype), grad_x)
        if need_weight:
            part = torch.where(own, grad_y, 0.0).to(wide).t() @ x.to(wide)
            grad_weight += part if mask is None else mask_apply.forward(part, mask, wide)
    return (
        grad_x if need_x else None,
        grad_weight.to(weight.dtype) if need_weight else None,
        grad_y.sum(0, dtype=wide) if need_bias else None,
    )
