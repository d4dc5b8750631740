"""The op `dora_linear`: y = g ⊙ (x Wᵀ + s (drop(x) Aᵀ) Bᵀ) + b with g = magnitude / weight_norm, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.ops import lora_linear
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import row_bucket, rows, unflatten
from peft_kernels.ops._tracing import fold_scaling
from peft_kernels.ops._weights import joined, split

SCHEMAS = {
    # weight and layout: a dense weight and nothing, or what `_weights.split` makes of one of 4 bits.
    # u is what g scales: x Wᵀ + s (drop(x) Aᵀ) Bᵀ.
    "dora_linear": (
        "(Tensor x, Tensor[] weight, int[] layout, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor magnitude,"
        " Tensor weight_norm, float scaling, float dropout_p, Tensor? seed) -> (Tensor y, Tensor s, Tensor u)"
    ),
    # Gradients of (x, weight, bias, lora_A, lora_B, magnitude): as many as `needs` asks for, in that order.
    "dora_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor? s, Tensor? u, Tensor[] weight, int[] layout, Tensor lora_A,"
        " Tensor lora_B, Tensor magnitude, Tensor weight_norm, float scaling, float dropout_p, Tensor? seed,"
        " bool[6] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two; `nf4`: whether the weight is of 4 bits."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    dropout: bool
    nf4: bool = False


def _problem(x: Tensor, nf4: bool, lora_A: Tensor, lora_B: Tensor, dropout: bool) -> Problem:
    (r, k), n, device = lora_A.shape, lora_B.shape[0], x.device
    return Problem(device.type, device.index, x.dtype, lora_A.dtype, row_bucket(x), n, k, r, dropout, nf4)


def problem(x, weight, lora_A, lora_B, magnitude, *, dropout_p=0.0, training=True, **_) -> Problem:
    return _problem(x, type(weight) is NF4Weight, lora_A, lora_B, training and dropout_p > 0)


def _select(x, weight, lora_A, lora_B, dropout):
    nf4 = type(weight) is NF4Weight
    key = (x.shape, x.dtype, x.device, nf4, lora_A.shape, lora_A.dtype, lora_B.shape, dropout)
    return dispatch.select_memoised("dora_linear", key, _problem, x, nf4, lora_A, lora_B, dropout)


def _forward(implementation, x, weight, bias, *others):
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if x.ndim == 2:
        return implementation.forward(x, weight, bias, *others)
    return tuple(unflatten(t, x.shape[:-1]) for t in implementation.forward(rows(x), weight, bias, *others))


def _backward(implementation, grad_y, x, s, u, *others):
    if grad_y.ndim == 2:
        return implementation.backward(grad_y, x, s, u, *others)
    flat = (t if t is None else rows(t) for t in (grad_y, x, s, u))
    grad_x, *grads = implementation.backward(*flat, *others)
    return grad_x if grad_x is None else unflatten(grad_x, grad_y.shape[:-1]), *grads


def kernel(x, weight, layout, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    (weight,) = joined(weight, layout, x.dtype)
    implementation = _select(x, weight, lora_A, lora_B, seed is not None)
    return _forward(implementation, x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed)


def fake(x, weight, layout, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    batch, n = x.shape[:-1], lora_B.shape[0]
    return x.new_empty(*batch, n), x.new_empty(*batch, lora_A.shape[0]), x.new_empty(*batch, n)


def backward_kernel(
    grad_y, x, s, u, weight, layout, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
):  # fmt: skip
    (weight,) = joined(weight, layout, grad_y.dtype)
    implementation = _select(grad_y, weight, lora_A, lora_B, seed is not None)
    grads = _backward(
        implementation, grad_y, x, s, u, weight, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
    )
    return [grad for grad in grads if grad is not None]


def backward_fake(
    grad_y, x, s, u, weight, layout, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
):  # fmt: skip
    (weight,) = joined(weight, layout, grad_y.dtype)
    grads = lora_linear.backward_fake(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs[:5])
    return [*grads, grad_y.new_empty(magnitude.shape, dtype=magnitude.dtype)] if needs[5] else grads


KERNELS = {"dora_linear": (kernel, fake), "dora_linear_backward": (backward_kernel, backward_fake)}


class DoraLinear(torch.autograd.Function):
    """Saves x, S, u and the seed, each only when some wanted gradient uses it. `weight` is the first tensor of a weight
    of 4 bits, `others` are the rest."""

    @staticmethod
    def forward(
        ctx, x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, layout, *others
    ):  # fmt: skip
        arguments = (bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed)
        if is_plain(x):
            (whole,) = joined((weight, *others), layout, x.dtype)
            ctx.implementation = _select(x, whole, lora_A, lora_B, seed is not None)
            y, s, u = _forward(ctx.implementation, x, whole, *arguments)
        else:
            ctx.implementation = None
            y, s, u = torch.ops.peft_kernels.dora_linear(x, (weight, *others), layout, *arguments)
        _, need_weight, _, need_a, need_b, need_magnitude = ctx.needs_input_grad[:6]
        kept = (x if need_a or need_weight else None, s if need_b else None, u if need_magnitude else None)
        ctx.save_for_backward(*kept, lora_A, lora_B, magnitude, weight_norm, seed, weight, *others)
        ctx.scaling, ctx.dropout_p, ctx.layout = scaling, dropout_p, layout
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("dora_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:6]
    x, s, u, lora_A, lora_B, magnitude, weight_norm, seed, *weight = saved
    arguments = (lora_A, lora_B, magnitude, weight_norm, ctx.scaling, ctx.dropout_p, seed, needs)
    if ctx.implementation is not None and is_plain(grad_y):
        (whole,) = joined(weight, ctx.layout, grad_y.dtype)
        grads = _backward(ctx.implementation, grad_y, x, s, u, whole, *arguments)
    else:
        backward = torch.ops.peft_kernels.dora_linear_backward
        wanted = iter(backward(grad_y, x, s, u, weight, ctx.layout, *arguments))
        grads = [next(wanted) if need else None for need in needs]
    return (*grads, *([None] * (4 + len(weight))))


def _under_autocast(x, weight, bias, *others):
    """As in `lora_linear`: x, W and b take the autocast dtype, the adapter stays as it is, and W of 4 bits too."""
    with torch.autocast(x.device.type, enabled=False):
        return dora_linear(*lora_linear.autocast_together(x, weight, bias), *others)


def dora_linear(x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    """The op with autograd, for arguments that `functional.dora_linear` has checked. `seed` is None without dropout."""
    lora_B, scaling = fold_scaling(lora_B, scaling)
    arguments = (bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return _under_autocast(x, weight, *arguments)
    (first,), others, layout = split((weight,))
    if torch.is_grad_enabled():
        return DoraLinear.apply(x, first, *arguments, layout, *others)
    return torch.ops.peft_kernels.dora_linear(x, [first, *others], layout, *arguments)[0]
