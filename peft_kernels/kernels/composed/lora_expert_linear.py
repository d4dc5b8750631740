"""`lora_expert_linear` as a loop over the experts that have rows, in the fewest PyTorch passes for each.

The host reads the offsets (one synchronisation on a GPU, forward and backward), so that experts without rows cost
nothing; it cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from peft_kernels.kernels import _base
from peft_kernels.kernels.composed._passes import add_dropped, cast, down, sum_over_rows, sum_rows


def unsupported(problem) -> str | None:
    return None


def forward(x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
    a, b = cast(lora_A, x.dtype), cast(lora_B, x.dtype)
    y, s = x.new_zeros(x.shape[0], weight.shape[1]), x.new_zeros(x.shape[0], a.shape[1])
    for e, rows in _base.expert_segments("lora_expert_linear", offsets, x.shape[0]):
        y_e = y[rows]
        _base.linear_into(y_e, x[rows], _base.expert(weight, e), None if bias is None else bias[e])
        down(x[rows], a[e], dropout_p, seed, s[rows], first_row=rows.start)
        y_e.addmm_(s[rows], b[e].t(), alpha=scaling)
    return y, s


def backward(grad_y, x, s, weight, lora_A, lora_B, offsets, scaling, dropout_p, seed, needs):
    need_x, need_weight, need_bias, need_a, need_b = needs
    a, b = cast(lora_A, grad_y.dtype), cast(lora_B, grad_y.dtype)
    grad_x = grad_y.new_zeros(grad_y.shape[0], weight.shape[2]) if need_x else None
    grad_weight, grad_a, grad_b = (
        torch.zeros_like(t) if need else None for t, need in ((weight, need_weight), (lora_A, need_a), (lora_B, need_b))
    )
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    grad_bias = grad_y.new_zeros(weight.shape[:2], dtype=wide) if need_bias else None
    for e, rows in _base.expert_segments("lora_expert_linear", offsets, grad_y.shape[0]):
        grad_y_e = grad_y[rows]
        grad_s = torch.mm(grad_y_e, b[e]) if need_x or need_a else None  # not yet scaled
        if grad_x is not None:
            _grad_x(grad_x[rows], grad_y_e, _base.expert(weight, e), grad_s, a[e], scaling, dropout_p, seed, rows.start)
        if grad_weight is not None:
            grad_weight[e] = sum_over_rows(grad_y_e, x[rows], weight[e])
        if grad_bias is not None:
            grad_bias[e] = sum_rows(grad_y_e)
        if grad_a is not None:
            grad_a[e] = sum_over_rows(grad_s, x[rows], lora_A[e], scaling, dropout_p, seed, first_row=rows.start)
        if grad_b is not None:
            grad_b[e] = sum_over_rows(grad_y_e, s[rows], lora_B[e], scaling)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b


def _grad_x(out, grad_y, weight, grad_s, a, scaling, dropout_p, seed, first_row) -> None:
    _base.grad_input_into(out, grad_y, weight)
    if seed is None:
        out.addmm_(grad_s, a, alpha=scaling)
    else:
        add_dropped(out, grad_s, a, scaling, dropout_p, seed, first_row=first_row)
