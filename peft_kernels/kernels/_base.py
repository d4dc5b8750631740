"""The frozen weight under an adapter: a dense matrix, or one of 4 bits. What implementations do with either."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight


def linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, a new tensor [M, N]."""
    if isinstance(weight, NF4Weight):
        return torch.ops.peft_kernels.nf4_linear(x, weight.tensors, weight.layout, bias)
    return F.linear(x, weight, bias)


def grad_input(grad_y: Tensor, weight: Tensor | NF4Weight) -> Tensor:
    """dY W, a new tensor [M, K]."""
    if isinstance(weight, NF4Weight):
        return torch.ops.peft_kernels.nf4_linear_backward(grad_y, weight.tensors, weight.layout)
    return torch.mm(grad_y, weight)
