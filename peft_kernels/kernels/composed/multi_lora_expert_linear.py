"""`multi_lora_expert_linear`: the base weight expert by expert, the adapters as `multi_lora_linear` has them.

The host reads the offsets and the ids (a synchronisation on a GPU for each, forward and backward); it cannot be
captured in a CUDA graph. Adapters and experts without rows cost nothing but their zero gradients.
"""

from __future__ import annotations

import torch

from peft_kernels.kernels import _base
from peft_kernels.kernels._experts import repeated, restacked, virtual_adapters, virtual_ids
from peft_kernels.kernels.composed import multi_lora_linear
from peft_kernels.kernels.composed._passes import sum_over_rows, sum_rows

_OP = "multi_lora_expert_linear"


def unsupported(problem) -> str | None:
    return None


def forward(x, weight, bias, stacks, offsets, ids, mix, dropout_ps, seeds, keep_s):
    e = len(offsets)
    base = _base.ExpertStack(weight, _base.expert_segments(_OP, offsets, x.shape[0]))
    adapters, ids = virtual_adapters(stacks, e), virtual_ids(ids, offsets)
    ps = repeated(dropout_ps, e)
    (y,), ss = multi_lora_linear.forward(x, [base], [bias], adapters, ids, mix, ps, seeds, keep_s)
    return y, ss


def backward(grad_y, x, ss, weight, stacks, offsets, ids, mix, dropout_ps, seeds, needs):
    e = len(offsets)
    base = _base.ExpertStack(weight, _base.expert_segments(_OP, offsets, grad_y.shape[0]))
    adapters, ids = virtual_adapters(stacks, e), virtual_ids(ids, offsets)
    each = needs._replace(
        weights=(False,), biases=(False,), lora_As=repeated(needs.lora_As, e), lora_Bs=repeated(needs.lora_Bs, e)
    )
    grad_x, grad_mix, _, _, grad_As, grad_Bs = multi_lora_linear.backward(
        [grad_y], x, ss, [base], adapters, ids, mix, repeated(dropout_ps, e), seeds, each
    )
    grad_weight = torch.zeros_like(weight) if needs.weights[0] else None
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    grad_bias = grad_y.new_zeros(weight.shape[:2], dtype=wide) if needs.biases[0] else None
    for expert, rows in base.segments:
        if grad_weight is not None:
            grad_weight[expert] = sum_over_rows(grad_y[rows], x[rows], weight[expert])
        if grad_bias is not None:
            grad_bias[expert] = sum_rows(grad_y[rows])
    return grad_x, grad_mix, [grad_weight], [grad_bias], restacked(grad_As, e), restacked(grad_Bs, e)
