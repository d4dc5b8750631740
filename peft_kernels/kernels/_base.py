"""The frozen weight under an adapter: a dense matrix, one of 4 bits, either of them under a mask, or a stack of either,
each of whose matrices has rows of its own. What implementations do with each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.ops import nf4_linear
from peft_kernels.ops._weights import split


class ExpertStack(NamedTuple):
    """A stack [E, N, K], of which each expert is the weight of its own rows of x. `segments`: (expert, its rows), in
    order, of those that have any; rows of nobody give 0. Its bias is [E, N]."""

    stack: Tensor | NF4Weight
    segments: list[tuple[int, slice]]

    @property
    def shape(self) -> tuple[int, int]:
        return self.stack.shape[-2], self.stack.shape[-1]

    def parts(self):
        return ((e, expert(self.stack, e), rows) for e, rows in self.segments)


class MaskedWeight(NamedTuple):
    """W ⊙ M. `clean`: whether the matrix is 0 outside the mask already."""

    matrix: Tensor | NF4Weight
    words: Tensor
    clean: bool

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape


Weight = Tensor | NF4Weight | ExpertStack | MaskedWeight


def expert_segments(op: str, offsets: Tensor, rows: int) -> list[tuple[int, slice]]:
    """(expert, its rows) for experts that have any, which the host reads.

    Raises:
        ValueError: offsets that do not ascend from 0 to `rows`.
    """
    start, found = 0, []
    for e, end in enumerate(offsets.tolist()):
        if not start <= end <= rows:
            raise ValueError(f"{op}: offsets[{e}] is {end}; expected one in [{start}, {rows}]")
        if end > start:
            found.append((e, slice(start, end)))
        start = end
    return found


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, a new tensor [M, N]."""
    if isinstance(weight, ExpertStack):
        y = x.new_zeros(x.shape[0], weight.shape[0])
        linear_into(y, x, weight, bias)
        return y
    if isinstance(weight, MaskedWeight):
        (first,), others, layout = split((weight.matrix,))
        masked_linear = torch.ops.peft_kernels.masked_linear
        return masked_linear(x, [first, *others], layout, weight.words, weight.clean, bias)
    if isinstance(weight, NF4Weight):
        return torch.ops.peft_kernels.nf4_linear(x, weight.tensors, weight.layout, bias)
    return F.linear(x, weight, bias)


def linear_into(y: Tensor, x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    """y = x Wᵀ + b. (Of a stack, rows of nobody stay as they are.)"""
    if isinstance(weight, ExpertStack):
        for e, matrix, rows in weight.parts():
            linear_into(y[rows], x[rows], matrix, None if bias is None else bias[e])
    elif isinstance(weight, (NF4Weight, MaskedWeight)):
        y.copy_(linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)


def grad_input(grad_y: Tensor, weight: Weight) -> Tensor:
    """dY W, a new tensor [M, K]."""
    if isinstance(weight, ExpertStack):
        grad_x = grad_y.new_zeros(grad_y.shape[0], weight.shape[1])
        grad_input_into(grad_x, grad_y, weight)
        return grad_x
    if isinstance(weight, MaskedWeight):
        (first,), others, layout = split((weight.matrix,))
        backward = torch.ops.peft_kernels.masked_linear_backward
        needs = (True, False, False, False)
        return backward(
            grad_y, None, [first, *others], layout, weight.words, weight.clean, None, None, None, needs
        )[0]  # fmt: skip
    if isinstance(weight, NF4Weight):
        return torch.ops.peft_kernels.nf4_linear_backward(grad_y, weight.tensors, weight.layout)
    return torch.mm(grad_y, weight)


def grad_input_into(grad_x: Tensor, grad_y: Tensor, weight: Weight) -> None:
    """dx = dY W. (Of a stack, rows of nobody stay as they are.)"""
    if isinstance(weight, ExpertStack):
        for _, matrix, rows in weight.parts():
            grad_input_into(grad_x[rows], grad_y[rows], matrix)
    elif isinstance(weight, (NF4Weight, MaskedWeight)):
        grad_x.copy_(grad_input(grad_y, weight))
    else:
        torch.mm(grad_y, weight, out=grad_x)


def add_grad_input(grad_x: Tensor, grad_y: Tensor, weight: Weight) -> None:
    """dx += dY W."""
    if isinstance(weight, ExpertStack):
        for _, matrix, rows in weight.parts():
            add_grad_input(grad_x[rows], grad_y[rows], matrix)
        return
    if isinstance(weight, MaskedWeight):
        grad_x.add_(grad_input(grad_y, weight))
        return
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
