"""2:4 weights through PyTorch's semi-structured tensors (CUTLASS, cuSPARSELt): y, and dx by a transposed copy.

Thin on purpose, and never run: there was no GPU. PyTorch's own reports: slower than dense with few rows (0.11x at one
row), 1.15x and more from about 3000 (pytorch#111339, #153825).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.sparse import SemiStructuredWeight
from peft_kernels.ops._backward import first_gradients

_MULTIPLE = 64  # of both sizes: what either library behind PyTorch takes


class Packed(NamedTuple):
    """PyTorch's forms of W and, where dx is to be a sparse product too, of Wᵀ."""

    weight: Tensor
    transposed: Tensor | None


def unavailable(weight: SemiStructuredWeight) -> str | None:
    """Why PyTorch has no such product for this weight, or None."""
    if weight.device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"takes 16-bit weights, not {weight.dtype}"
    if any(size % _MULTIPLE for size in weight.shape):
        return f"takes sizes that are multiples of {_MULTIPLE}, not {tuple(weight.shape)}"
    return None


def pack(weight: SemiStructuredWeight) -> Packed:
    """Packs a weight for its GPU: with one dense copy while it does."""
    dense = weight.dense()
    convert = torch.sparse.to_sparse_semi_structured
    return Packed(convert(dense), convert(dense.t().contiguous()) if weight.transposable else None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, packed, weight):
        ctx.packed, ctx.weight = packed, weight
        return F.linear(x, packed.weight, bias)

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("sparse_linear", _gradients, ctx, grad_y, ())


def _gradients(ctx, grad_y, saved):
    need_x, need_bias, *_ = ctx.needs_input_grad
    grad_x = grad_bias = None
    if need_x and ctx.packed.transposed is not None:
        grad_x = F.linear(grad_y, ctx.packed.transposed)
    elif need_x:
        weight, needs = ctx.weight, (True, False, False)
        backward = torch.ops.peft_kernels.sparse_linear_backward
        (grad_x,) = backward(grad_y, None, weight.tensors, weight.layout, weight.numbers, needs)
    if need_bias:
        grad_bias = grad_y.flatten(0, -2).sum(0, dtype=torch.float32)
    return grad_x, grad_bias, None, None


def linear(x: Tensor, packed: Packed, weight: SemiStructuredWeight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b [..., N] for x [..., K] in W's dtype."""
    return _Linear.apply(x, bias, packed, weight)
