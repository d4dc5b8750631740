"""The op `nf4_linear`: y = x Wᵀ + b with W in 4 bits, frozen; its gradient of x, and its registration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.nf4 import NF4Weight, from_layout
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import row_bucket, rows, unflatten
from peft_kernels.ops.lora_linear import autocast_together

SCHEMAS = {
    # q and layout: `tensors` and `layout` of an NF4Weight.
    "nf4_linear": "(Tensor x, Tensor[] q, int[] layout, Tensor? bias) -> Tensor",
    # The gradient of x.
    "nf4_linear_backward": "(Tensor grad_y, Tensor[] q, int[] layout) -> Tensor",
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    m: int
    n: int
    k: int
    blocksize: int
    nested: bool


def _problem(x: Tensor, q: NF4Weight) -> Problem:
    device, (n, k, *_) = x.device, q.layout
    return Problem(device.type, device.index, x.dtype, row_bucket(x), n, k, q.blocksize, q.is_nested)


def problem(x: Tensor, q: NF4Weight, bias: Tensor | None = None) -> Problem:
    return _problem(x, q)


def select(x: Tensor, q: NF4Weight):
    """The implementation for rows as those of `x` (dY in backward) and this weight."""
    key = (x.shape[:-1], x.dtype, x.device, *q.layout)
    return dispatch.select_memoised("nf4_linear", key, _problem, x, q)


def _forward(implementation, x, q, bias):
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if x.ndim == 2:
        return implementation.forward(x, q, bias)
    return unflatten(implementation.forward(rows(x), q, bias), x.shape[:-1])


def _backward(implementation, grad_y, q):
    if grad_y.ndim == 2:
        return implementation.backward(grad_y, q)
    return unflatten(implementation.backward(rows(grad_y), q), grad_y.shape[:-1])


def kernel(x, q, layout, bias):
    weight = from_layout(q, layout, x.dtype)
    return _forward(select(x, weight), x, weight, bias)


def fake(x, q, layout, bias):
    return x.new_empty(*x.shape[:-1], layout[0])


def backward_kernel(grad_y, q, layout):
    weight = from_layout(q, layout, grad_y.dtype)
    return _backward(select(grad_y, weight), grad_y, weight)


def backward_fake(grad_y, q, layout):
    return grad_y.new_empty(*grad_y.shape[:-1], layout[1])


KERNELS = {"nf4_linear": (kernel, fake), "nf4_linear_backward": (backward_kernel, backward_fake)}


class Nf4Linear(torch.autograd.Function):
    """Saves references to the packed weight, and only where the gradient of x is wanted."""

    @staticmethod
    def forward(ctx, x, bias, layout, *q):
        weight = from_layout(q, layout, x.dtype)
        if is_plain(x):
            ctx.implementation = select(x, weight)
            y = _forward(ctx.implementation, x, weight, bias)
        else:
            ctx.implementation = None
            y = torch.ops.peft_kernels.nf4_linear(x, q, layout, bias)
        ctx.save_for_backward(*(q if ctx.needs_input_grad[0] else ()))
        ctx.layout = layout
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("nf4_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, q):
    need_x, need_bias = ctx.needs_input_grad[:2]
    grad_x = grad_bias = None
    if need_x and ctx.implementation is not None and is_plain(grad_y):
        grad_x = _backward(ctx.implementation, grad_y, from_layout(q, ctx.layout, grad_y.dtype))
    elif need_x:
        grad_x = torch.ops.peft_kernels.nf4_linear_backward(grad_y, q, ctx.layout)
    if need_bias:
        grad_bias = rows(grad_y).sum(0, dtype=torch.promote_types(torch.float32, grad_y.dtype))
    return (grad_x, grad_bias, None, *([None] * ctx.layout[-1]))


def nf4_linear(x: Tensor, q: NF4Weight, bias: Tensor | None) -> Tensor:
    """The op with autograd, for arguments that `functional.nf4_linear` has checked."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        device = x.device.type
        x, bias = autocast_together(x, bias)
        with torch.autocast(device, enabled=False):
            return nf4_linear(x, q, bias)
    if torch.is_grad_enabled():
        return Nf4Linear.apply(x, bias, q.layout, *q.tensors)
    return torch.ops.peft_kernels.nf4_linear(x, q.tensors, q.layout, bias)
