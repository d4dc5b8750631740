"""The op `sparse_linear`: y = x Wᵀ + b with a compressed W, its gradients (of W only where whole blocks train), and its
registration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats import sparse
from peft_kernels.formats.sparse import BlockWeight, SparseWeight
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import row_bucket, rows, unflatten
from peft_kernels.ops.lora_linear import autocast_together

SCHEMAS = {
    # weight, layout and numbers: `tensors`, `layout` and `numbers` of a compressed weight.
    "sparse_linear": "(Tensor x, Tensor[] weight, str layout, int[] numbers, Tensor? bias) -> Tensor",
    # Gradients of (x, values, bias): as many as `needs` asks for, in that order. Only the values of layout "block", the
    # first tensor of the weight, have one.
    "sparse_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor[] weight, str layout, int[] numbers, bool[3] needs) -> Tensor[]"
    ),
}

_DENSITIES = 20  # dispatch tells so many apart


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two, `density` to twentieths; `weight_dtype` is None
    for 4 bits, `block` 0 for layouts without blocks."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    layout: str
    density: float
    block: int
    m: int
    n: int
    k: int


def _weight_dtype(weight: SparseWeight) -> torch.dtype | None:
    return None if isinstance(weight, sparse.Nf4BitmapWeight) else weight.dtype


def _problem(x: Tensor, weight: SparseWeight) -> Problem:
    device, (n, k) = x.device, weight.shape
    density = round(weight.density * _DENSITIES) / _DENSITIES
    block = weight.block if isinstance(weight, BlockWeight) else 0
    return Problem(
        device.type, device.index, x.dtype, _weight_dtype(weight), weight.layout, density, block, row_bucket(x), n, k
    )


def problem(x: Tensor, weight: SparseWeight, bias: Tensor | None = None) -> Problem:
    return _problem(x, weight)


def select(x: Tensor, weight: SparseWeight):
    """The implementation for rows as those of `x` (dY in backward) and this weight."""
    key = (x.shape[:-1], x.dtype, x.device, weight.layout, _weight_dtype(weight), *weight.numbers)
    return dispatch.select_memoised("sparse_linear", key, _problem, x, weight)


def _forward(implementation, x, weight, bias):
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if x.ndim == 2:
        return implementation.forward(x, weight, bias)
    return unflatten(implementation.forward(rows(x), weight, bias), x.shape[:-1])


def _backward(implementation, grad_y, x, weight, needs):
    """Gradients of (x, values, bias), None where `needs` says that nobody asked."""
    if grad_y.ndim == 2:
        return implementation.backward(grad_y, x, weight, needs)
    flat = (t if t is None else rows(t) for t in (grad_y, x))
    grad_x, *others = implementation.backward(*flat, weight, needs)
    return grad_x if grad_x is None else unflatten(grad_x, grad_y.shape[:-1]), *others


def kernel(x, weight, layout, numbers, bias):
    weight = sparse.from_numbers(layout, weight, numbers, x.dtype)
    return _forward(select(x, weight), x, weight, bias)


def fake(x, weight, layout, numbers, bias):
    n, _ = sparse.from_numbers(layout, weight, numbers, x.dtype).shape
    return x.new_empty(*x.shape[:-1], n)


def backward_kernel(grad_y, x, weight, layout, numbers, needs):
    weight = sparse.from_numbers(layout, weight, numbers, grad_y.dtype)
    grads = _backward(select(grad_y, weight), grad_y, x, weight, needs)
    return [grad for grad in grads if grad is not None]


def backward_fake(grad_y, x, weight, layout, numbers, needs):
    n, k = sparse.from_numbers(layout, weight, numbers, grad_y.dtype).shape
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    grads = []
    if needs[0]:
        grads.append(grad_y.new_empty(*grad_y.shape[:-1], k))
    if needs[1]:
        grads.append(torch.empty_like(weight[0], memory_format=torch.contiguous_format))
    if needs[2]:
        grads.append(grad_y.new_empty(n, dtype=wide))
    return grads


KERNELS = {"sparse_linear": (kernel, fake), "sparse_linear_backward": (backward_kernel, backward_fake)}


class SparseLinear(torch.autograd.Function):
    """Saves x where block values train, and references to the weight where x wants a gradient. `values` is the weight's
    first tensor, `others` are the rest."""

    @staticmethod
    def forward(ctx, x, values, bias, layout, numbers, *others):
        if is_plain(x):
            weight = sparse.from_numbers(layout, (values, *others), numbers, x.dtype)
            implementation = ctx.implementation = select(x, weight)
            y = _forward(implementation, x, weight, bias)
        else:
            ctx.implementation = None
            y = torch.ops.peft_kernels.sparse_linear(x, (values, *others), layout, numbers, bias)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, *others)
        ctx.layout, ctx.numbers = layout, numbers
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("sparse_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:3]
    x, *tensors = saved
    if ctx.implementation is not None and is_plain(grad_y):
        weight = sparse.from_numbers(ctx.layout, tensors, ctx.numbers, grad_y.dtype)
        grads = _backward(ctx.implementation, grad_y, x, weight, needs)
    else:
        backward = torch.ops.peft_kernels.sparse_linear_backward
        wanted = iter(backward(grad_y, x, tensors, ctx.layout, ctx.numbers, needs))
        grads = [next(wanted) if need else None for need in needs]
    return (*grads, *([None] * (1 + len(tensors))))


def sparse_linear(x: Tensor, weight: SparseWeight, bias: Tensor | None) -> Tensor:
    """The op with autograd, for arguments that `functional.sparse_linear` has checked."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        # The weight stays as it is: implementations round its pieces.
        x, bias = autocast_together(x, bias)
        with torch.autocast(x.device.type, enabled=False):
            return sparse_linear(x, weight, bias)
    tensors = weight.tensors
    if not torch.is_grad_enabled():
        return torch.ops.peft_kernels.sparse_linear(x, tensors, weight.layout, weight.numbers, bias)
    return SparseLinear.apply(x, tensors[0], bias, weight.layout, weight.numbers, *tensors[1:])
