"""Specification of y_m = x_m (W + Δ_i)ᵀ + b, i the delta of row m, and of its gradients, in plain PyTorch.

x [M, K], W [N, K] dense or NF4, decoded to x's dtype. W + Δ is added in at least float32 and rounded once to x's dtype.
Where `ids` is None all rows have the only delta; an id that is none of a delta's means W alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.sparse_delta import SparseDelta, added
from peft_kernels.kernels.reference import nf4_dequantize


def unsupported(problem) -> str | None:
    return None


def changed(weight: Tensor | NF4Weight, delta: SparseDelta | None, dtype: torch.dtype) -> Tensor:
    """W + Δ in `dtype`."""
    dense = nf4_dequantize.forward(weight) if isinstance(weight, NF4Weight) else weight
    if delta is None:
        return dense.to(dtype)
    whole, flat = dense.flatten(), delta.positions.flat.long()
    return whole.to(dtype).index_copy(0, flat, added(whole[flat], delta.values, dtype)).view(dense.shape)


def _segments(ids, deltas, m):
    """(mask of the rows, number of their delta) for each delta and, last, for W alone."""
    if ids is None:
        return [(torch.ones(m, dtype=torch.bool, device=deltas[0].device), 0)]
    found = [(ids == i, i) for i in range(len(deltas))]
    return [*found, ((ids < 0) | (ids >= len(deltas)), None)]


def forward(x, weight, deltas, ids, bias):
    y = x.new_zeros(x.shape[0], weight.shape[0])
    for rows, i in _segments(ids, deltas, x.shape[0]):
        y[rows] = F.linear(x[rows], changed(weight, None if i is None else deltas[i], x.dtype), bias)
    return y


def backward(grad_y, x, weight, deltas, ids, needs):
    """Gradients (dx, dW, dbias, [dvalues of each delta]); None where `needs` says that nobody asked."""
    need_x, need_weight, need_bias, need_values = needs
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    grad_x = grad_y.new_zeros(grad_y.shape[0], weight.shape[1]) if need_x else None
    grad_values: list[Tensor | None] = [None] * len(deltas)
    for rows, i in _segments(ids, deltas, grad_y.shape[0]):
        if grad_x is not None:
            grad_x[rows] = grad_y[rows] @ changed(weight, None if i is None else deltas[i], grad_y.dtype)
        if i is not None and need_values[i]:
            whole = grad_y[rows].to(wide).t() @ x[rows].to(wide)
            grad_values[i] = whole.flatten()[deltas[i].positions.flat.long()].to(deltas[i].values.dtype)
    grad_weight = (grad_y.to(wide).t() @ x.to(wide)).to(weight.dtype) if need_weight else None
    return grad_x, grad_weight, grad_y.sum(0, dtype=wide) if need_bias else None, grad_values
