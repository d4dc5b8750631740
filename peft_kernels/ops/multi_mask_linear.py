"""The op `multi_mask_linear`: y_m = x_m (W ⊙ M_i)ᵀ + b, i the mask of row m, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import row_bucket, rows, unflatten
from peft_kernels.ops.lora_linear import autocast_together

SCHEMAS = {
    # words: int32 [masks, N, ceil(K / 32)], of a PackedMaskStack. ids: int64 [rows], -1 for the whole W.
    "multi_mask_linear": "(Tensor x, Tensor weight, Tensor words, Tensor ids, Tensor? bias) -> Tensor",
    # Gradients of (x, weight, bias): as many as `needs` asks for, in that order.
    "multi_mask_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor weight, Tensor words, Tensor ids, bool[3] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two; `masks` is how many there are."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    weight_dtype: torch.dtype
    m: int
    n: int
    k: int
    masks: int


def _problem(x: Tensor, weight: Tensor, masks: int) -> Problem:
    device, (n, k) = x.device, weight.shape
    return Problem(device.type, device.index, x.dtype, weight.dtype, row_bucket(x), n, k, masks)


def problem(x, weight, masks, mask_ids, bias=None) -> Problem:
    return _problem(x, weight, len(masks))


def select(x: Tensor, weight: Tensor, masks: int):
    """The implementation for rows as those of `x` (dY in backward)."""
    key = (x.shape[:-1], x.dtype, x.device, weight.shape, weight.dtype, masks)
    return dispatch.select_memoised("multi_mask_linear", key, _problem, x, weight, masks)


def _forward(implementation, x, weight, words, ids, bias):
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if x.ndim == 2:
        return implementation.forward(x, weight, words, ids, bias)
    return unflatten(implementation.forward(rows(x), weight, words, ids, bias), x.shape[:-1])


def _backward(implementation, grad_y, x, weight, words, ids, needs):
    """Gradients of (x, weight, bias), None where nobody asked."""
    if grad_y.ndim == 2:
        return implementation.backward(grad_y, x, weight, words, ids, needs)
    flat = (t if t is None else rows(t) for t in (grad_y, x))
    grad_x, *others = implementation.backward(*flat, weight, words, ids, needs)
    return grad_x if grad_x is None else unflatten(grad_x, grad_y.shape[:-1]), *others


def kernel(x, weight, words, ids, bias):
    return _forward(select(x, weight, words.shape[0]), x, weight, words, ids, bias)


def fake(x, weight, words, ids, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def backward_kernel(grad_y, x, weight, words, ids, needs):
    grads = _backward(select(grad_y, weight, words.shape[0]), grad_y, x, weight, words, ids, needs)
    return [grad for grad in grads if grad is not None]


def backward_fake(grad_y, x, weight, words, ids, needs):
    n, k = weight.shape
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    shapes, dtypes = ((*grad_y.shape[:-1], k), (n, k), (n,)), (grad_y.dtype, weight.dtype, wide)
    wanted = zip(shapes, dtypes, needs, strict=True)
    return [grad_y.new_empty(shape, dtype=dtype) for shape, dtype, need in wanted if need]


KERNELS = {"multi_mask_linear": (kernel, fake), "multi_mask_linear_backward": (backward_kernel, backward_fake)}


class MultiMaskLinear(torch.autograd.Function):
    """Saves x where W trains, the ids, and references to W and the masks."""

    @staticmethod
    def forward(ctx, x, weight, bias, words, ids):
        if is_plain(x):
            ctx.implementation = select(x, weight, words.shape[0])
            y = _forward(ctx.implementation, x, weight, words, ids, bias)
        else:
            ctx.implementation = None
            y = torch.ops.peft_kernels.multi_mask_linear(x, weight, words, ids, bias)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, words, ids)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("multi_mask_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:3]
    if ctx.implementation is not None and is_plain(grad_y):
        return (*_backward(ctx.implementation, grad_y, *saved, needs), None, None)
    wanted = iter(torch.ops.peft_kernels.multi_mask_linear_backward(grad_y, *saved, needs))
    return (*[next(wanted) if need else None for need in needs], None, None)


def multi_mask_linear(x: Tensor, weight: Tensor, words: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
    """The op with autograd, for arguments that `functional.multi_mask_linear` has checked."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, bias = autocast_together(x, bias)  # W stays as it is: its masked pieces are rounded
        with torch.autocast(x.device.type, enabled=False):
            return multi_mask_linear(x, weight, words, ids, bias)
    if torch.is_grad_enabled():
        return MultiMaskLinear.apply(x, weight, bias, words, ids)
    return torch.ops.peft_kernels.multi_mask_linear(x, weight, words, ids, bias)
