"""`masked_linear` as PyTorch's matmuls on one masked piece of W after another.

y is cut along N and dx along K, so that each element is summed in one matmul and rounded once. A weight that is 0
outside the mask already goes into one matmul as it is; its dW gets the mask in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.kernels import _base
from peft_kernels.kernels._masked import column_pieces, grad_at, masked_grad_weight, row_pieces
from peft_kernels.kernels.composed._passes import sum_rows


def unsupported(problem) -> str | None:
    return None


def _is_whole(weight, clean: bool, dtype: torch.dtype) -> bool:
    """Whether the weight goes into a matmul as it is."""
    return clean and not (isinstance(weight, Tensor) and weight.dtype != dtype)


def forward(x, weight, words, clean, bias):
    if _is_whole(weight, clean, x.dtype):
        return _base.linear(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, piece in row_pieces(weight, words, clean, x.dtype):
        y[:, rows] = F.linear(x, piece, None if bias is None else bias[rows])
    return y


def backward(grad_y, x, weight, words, clean, places, values_dtype, needs):
    need_x, need_weight, need_bias, need_values = needs
    return (
        _grad_x(grad_y, weight, words, clean) if need_x else None,
        masked_grad_weight(grad_y, x, weight, words) if need_weight else None,
        sum_rows(grad_y) if need_bias else None,
        grad_at(grad_y, x, places, values_dtype) if need_values else None,
    )


def _grad_x(grad_y, weight, words, clean):
    if _is_whole(weight, clean, grad_y.dtype):
        return _base.grad_input(grad_y, weight)
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[1])
    for columns, piece in column_pieces(weight, words, clean, grad_y.dtype):
        torch.mm(grad_y, piece, out=grad_x[:, columns])
    return grad_x
