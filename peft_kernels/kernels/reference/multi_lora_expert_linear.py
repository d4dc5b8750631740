"""Specification of a stack of linears, each on its own rows, which choose their adapters: `multi_lora_linear` of every
expert on all rows, masked.

x [M, K] sorted by expert, W [E, N, K], b [E, N], A_a [E, r_a, K], B_a [E, N, r_a], ids [M, k] (-1: none); expert e owns
the rows from offsets[e-1] up to offsets[e]:

y[m] = x[m] W_eᵀ + b_e + Σ_i mix[m, i] s_a (drop(x)[m] A_aeᵀ) B_aeᵀ,   a = ids[m, i]
"""

from __future__ import annotations

import torch

from peft_kernels.formats.adapter_table import AdapterLists
from peft_kernels.kernels.reference import multi_lora_linear, nf4_dequantize
from peft_kernels.kernels.reference.lora_expert_linear import owned


def unsupported(problem) -> str | None:
    return None


def _of_expert(stacks, e: int) -> AdapterLists:
    lora_As, lora_Bs = ([stack[e] for stack in side] for side in (stacks.lora_As, stacks.lora_Bs))
    others = (stacks.outputs, stacks.adapters, stacks.scalings, stacks.widths, stacks.count)
    return AdapterLists(lora_As, lora_Bs, *others)


def forward(x, weight, bias, stacks, offsets, ids, mix, dropout_ps, seeds, keep_s):
    weight = nf4_dequantize.dense(weight)
    y, s = x.new_zeros(x.shape[0], weight.shape[1]), x.new_zeros(*ids.shape, stacks.widths[0])
    for e, own in enumerate(owned(offsets, x.shape[0])):
        biases = [None if bias is None else bias[e]]
        own_ids = torch.where(own, ids, -1)
        (y_e,), (s_e,) = multi_lora_linear.forward(
            x, [weight[e]], biases, _of_expert(stacks, e), own_ids, mix, dropout_ps, seeds, True
        )
        y, s = torch.where(own, y_e, y), torch.where(own.unsqueeze(2), s_e, s)
    return y, [s] if keep_s else []


def backward(grad_y, x, ss, weight, stacks, offsets, ids, mix, dropout_ps, seeds, needs):
    """Gradients (dx, dmix, [dW], [db], [dA], [dB]); None where `needs` says that nobody asked."""
    weight, each = nf4_dequantize.dense(weight), []
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    grad_x = grad_y.new_zeros(grad_y.shape[0], weight.shape[2]) if needs.x else None
    grad_mix = grad_y.new_zeros(ids.shape, dtype=wide) if needs.adapter_weights else None
    for e, own in enumerate(owned(offsets, grad_y.shape[0])):
        own_x = None if x is None else x.masked_fill(~own, 0.0)
        grad_x_e, grad_mix_e, *others = multi_lora_linear.backward(
            [grad_y.masked_fill(~own, 0.0)], own_x, ss, [weight[e]], _of_expert(stacks, e), torch.where(own, ids, -1),
            mix, dropout_ps, seeds, needs,
        )  # fmt: skip
        if needs.x:
            grad_x = torch.where(own, grad_x_e, grad_x)
        if needs.adapter_weights:
            grad_mix = grad_mix + grad_mix_e
        each.append(others)
    # For each of the kinds, for each parameter, the experts side by side.
    stacked = [[_stacked(parts) for parts in zip(*kind, strict=True)] for kind in zip(*each, strict=True)]
    return grad_x, grad_mix, *stacked


def _stacked(parts):
    return None if parts[0] is None else torch.stack(parts)
