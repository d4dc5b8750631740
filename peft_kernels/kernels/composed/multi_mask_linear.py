"""`multi_mask_linear` as a loop over the masks that some row chose, each as `masked_linear` on its rows.

The host reads the ids (one synchronisation on a GPU, forward and backward). Rows of one mask that lie together are not
copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.kernels import _base
from peft_kernels.kernels._masked import like, strips
from peft_kernels.kernels.composed._passes import sum_over_rows, sum_rows
from peft_kernels.kernels.composed.multi_lora_linear import Rows, segments


def unsupported(problem) -> str | None:
    return None


def _parts(words: Tensor, ids: Tensor) -> list[tuple[Rows, Tensor | None]]:
    """(rows, the words of their mask; None for the whole W) of every mask that some row chose."""
    count = words.shape[0]
    # `segments` passes over what is below 0: the whole W comes last in the order.
    numbers = torch.where((ids < 0) | (ids >= count), count, ids)
    found = segments(numbers.unsqueeze(1))
    return [(segment.rows, words[segment.adapter] if segment.adapter < count else None) for segment in found]


def _weight(weight: Tensor, mask: Tensor | None, dtype: torch.dtype):
    """What `_base` multiplies with: W in `dtype`, or W under a mask."""
    if mask is None:
        return weight.to(dtype)
    return _base.MaskedWeight(weight, mask, False)


def forward(x, weight, words, ids, bias):
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, mask in _parts(words, ids):
        y[rows] = _base.linear(x[rows], _weight(weight, mask, x.dtype), bias)
    return y


def backward(grad_y, x, weight, words, ids, needs):
    need_x, need_weight, need_bias = needs
    parts = _parts(words, ids)
    grad_x = None
    if need_x:
        grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[1])
        for rows, mask in parts:
            grad_x[rows] = _base.grad_input(grad_y[rows], _weight(weight, mask, grad_y.dtype))
    return (
        grad_x,
        _grad_weight(grad_y, x, weight, parts) if need_weight else None,
        sum_rows(grad_y) if need_bias else None,
    )


def _grad_weight(grad_y, x, weight, parts):
    """Σ (dY_iᵀ x_i) ⊙ M_i, one strip of rows of W at a time, in float32 until the one rounding."""
    (n, k), wide = weight.shape, torch.promote_types(torch.float32, grad_y.dtype)
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows_of = [(grad_y[rows], x[rows], mask) for rows, mask in parts]
    for start, stop in strips(n, k * wide.itemsize, weight.device):
        total = torch.zeros(stop - start, k, dtype=wide, device=weight.device)
        for own_grad, own_x, mask in rows_of:
            part = sum_over_rows(own_grad[:, start:stop], own_x, like(stop - start, k, wide, weight.device))
            if mask is not None:
                torch.ops.peft_kernels.mask_apply_(part, mask[start:stop])
            total += part
        grad[start:stop] = total
    return grad
