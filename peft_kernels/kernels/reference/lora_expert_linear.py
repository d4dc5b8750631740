"""Specification of a stack of LoRA linears, each on its own rows: `lora_linear` of every expert on all rows, masked.

x [M, K] sorted by expert, W [E, N, K], b [E, N], A [E, r, K], B [E, N, r]; expert e owns the rows from offsets[e-1]
up to offsets[e]. W in NF4 is decoded.
"""

from __future__ import annotations

import torch

from peft_kernels.kernels.reference import lora_linear, nf4_dequantize


def unsupported(problem) -> str | None:
    return None


def owned(offsets: torch.Tensor, rows: int):
    """For each expert, which rows are its own [M, 1]."""
    row = torch.arange(rows, device=offsets.device).unsqueeze(1)
    starts = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    return [(row >= start) & (row < end) for start, end in zip(starts, offsets, strict=True)]


def forward(x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
    weight = nf4_dequantize.dense(weight)
    y, s = x.new_zeros(x.shape[0], weight.shape[1]), x.new_zeros(x.shape[0], lora_A.shape[1])
    for e, own in enumerate(owned(offsets, x.shape[0])):
        b = None if bias is None else bias[e]
        y_e, s_e = lora_linear.forward(x, weight[e], b, lora_A[e], lora_B[e], scaling, dropout_p, seed)
        y, s = torch.where(own, y_e, y), torch.where(own, s_e, s)
    return y, s


def backward(grad_y, x, s, weight, lora_A, lora_B, offsets, scaling, dropout_p, seed, needs):
    """Gradients (dx, dW, dbias, dA, dB); None where `needs` says that nobody asked."""
    weight, each = nf4_dequantize.dense(weight), []
    grad_x = grad_y.new_zeros(grad_y.shape[0], weight.shape[2]) if needs[0] else None
    for e, own in enumerate(owned(offsets, grad_y.shape[0])):
        masked = [t if t is None else t.masked_fill(~own, 0.0) for t in (grad_y, x, s)]
        grad_x_e, *others = lora_linear.backward(
            *masked, weight[e], lora_A[e], lora_B[e], scaling, dropout_p, seed, needs
        )
        if needs[0]:
            grad_x = torch.where(own, grad_x_e, grad_x)
        each.append(others)
    stacked = (
        torch.stack(grads) if need else None for grads, need in zip(zip(*each, strict=True), needs[1:], strict=True)
    )
    return grad_x, *stacked
