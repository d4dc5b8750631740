"""The frozen weight under an adapter: a dense matrix, or one of 4 bits. What implementations do with either."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.ops import nf4_linear


def linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, a new tensor [M, N]."""
    if isinstance(weight, NF4Weight):
        return torch.ops.peft_kernels.nf4_linear(x, weight.tensors, weight.layout, bias)
    return F.linear(x, weight, bias)


def linear_into(y: Tensor, x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> None:
    """y = x Wᵀ + b."""
    if isinstance(weight, NF4Weight):
        y.copy_(linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)


def grad_input(grad_y: Tensor, weight: Tensor | NF4Weight) -> Tensor:
    """dY W, a new tensor [M, K]."""
    if isinstance(weight, NF4Weight):
        return torch.ops.peft_kernels.nf4_linear_backward(grad_y, weight.tensors, weight.layout)
    return torch.mm(grad_y, weight)


def grad_input_into(grad_x: Tensor, grad_y: Tensor, weight: Tensor | NF4Weight) -> None:
    """dx = dY W."""
    if isinstance(weight, NF4Weight):
        grad_x.copy_(grad_input(grad_y, weight))
    else:
        torch.mm(grad_y, weight, out=grad_x)


def add_grad_input(grad_x: Tensor, grad_y: Tensor, weight: Tensor | NF4Weight) -> None:
    """dx += dY W."""
    if not isinstance(weight, NF4Weight):
        grad_x.addmm_(grad_y, weight)
        return
    implementation = nf4_linear.select(grad_y, weight)
    if hasattr(implementation, "add_backward"):
        implementation.add_backward(grad_x, grad_y, weight)
    else:
        grad_x.add_(implementation.backward(grad_y, weight))


def expert(weight: Tensor | NF4Weight, index: int) -> Tensor | NF4Weight:
    """The matrix [out, in] of one expert of a stack."""
    return weight.expert(index) if isinstance(weight, NF4Weight) else weight[index]
