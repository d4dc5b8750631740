"""The op `dora_linear`: y = g ⊙ (x Wᵀ + s (drop(x) Aᵀ) Bᵀ) + b with g = magnitude / weight_norm, and its gradients."""

from __future__ import annotations

import torch

from peft_kernels.ops import lora_linear
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import rows, unflatten
from peft_kernels.ops._tracing import fold_scaling

SCHEMAS = {
    # u is what g scales: x Wᵀ + s (drop(x) Aᵀ) Bᵀ.
    "dora_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor weight_norm,"
        " float scaling, float dropout_p, Tensor? seed) -> (Tensor y, Tensor s, Tensor u)"
    ),
    # Gradients of (x, weight, bias, lora_A, lora_B, magnitude): as many as `needs` asks for, in that order.
    "dora_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor? s, Tensor? u, Tensor weight, Tensor lora_A, Tensor lora_B,"
        " Tensor magnitude, Tensor weight_norm, float scaling, float dropout_p, Tensor? seed, bool[6] needs)"
        " -> Tensor[]"
    ),
}

Problem = lora_linear.Problem


def problem(x, weight, lora_A, lora_B, magnitude, **options) -> Problem:
    return lora_linear.problem(x, weight, lora_A, lora_B, **options)


def _select(x, lora_A, lora_B, dropout):
    return lora_linear.select("dora_linear", x, lora_A, lora_B, dropout)


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


def kernel(x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    implementation = _select(x, lora_A, lora_B, seed is not None)
    return _forward(implementation, x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed)


def fake(x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    batch, n = x.shape[:-1], weight.shape[0]
    return x.new_empty(*batch, n), x.new_empty(*batch, lora_A.shape[0]), x.new_empty(*batch, n)


def backward_kernel(
    grad_y, x, s, u, weight, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
):  # fmt: skip
    implementation = _select(grad_y, lora_A, lora_B, seed is not None)
    grads = _backward(
        implementation, grad_y, x, s, u, weight, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
    )
    return [grad for grad in grads if grad is not None]


def backward_fake(
    grad_y, x, s, u, weight, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed, needs
):  # fmt: skip
    grads = lora_linear.backward_fake(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs[:5])
    return [*grads, grad_y.new_empty(magnitude.shape, dtype=magnitude.dtype)] if needs[5] else grads


KERNELS = {"dora_linear": (kernel, fake), "dora_linear_backward": (backward_kernel, backward_fake)}


class DoraLinear(torch.autograd.Function):
    """Saves x, S, u and the seed, each only when some wanted gradient uses it."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
        arguments = (x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed)
        if is_plain(x):
            ctx.implementation = _select(x, lora_A, lora_B, seed is not None)
            y, s, u = _forward(ctx.implementation, *arguments)
        else:
            ctx.implementation = None
            y, s, u = torch.ops.peft_kernels.dora_linear(*arguments)
        _, need_weight, _, need_a, need_b, need_magnitude = ctx.needs_input_grad[:6]
        kept = (x if need_a or need_weight else None, s if need_b else None, u if need_magnitude else None)
        ctx.save_for_backward(*kept, weight, lora_A, lora_B, magnitude, weight_norm, seed)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("dora_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:6]
    *tensors, seed = saved
    arguments = (grad_y, *tensors, ctx.scaling, ctx.dropout_p, seed, needs)
    if ctx.implementation is not None and is_plain(grad_y):
        grads = _backward(ctx.implementation, *arguments)
    else:
        wanted = iter(torch.ops.peft_kernels.dora_linear_backward(*arguments))
        grads = [next(wanted) if need else None for need in needs]
    return (*grads, None, None, None, None)


def _under_autocast(x, weight, bias, *others):
    """As in `lora_linear`: x, W and b take the autocast dtype, the adapter stays as it is."""
    with torch.autocast(x.device.type, enabled=False):
        return dora_linear(*lora_linear.autocast_together(x, weight, bias), *others)


def dora_linear(x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed):
    """The op with autograd, for arguments that `functional.dora_linear` has checked. `seed` is None without dropout."""
    lora_B, scaling = fold_scaling(lora_B, scaling)
    arguments = (lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return _under_autocast(x, weight, bias, *arguments)
    if torch.is_grad_enabled():
        return DoraLinear.apply(x, weight, bias, *arguments)
    return torch.ops.peft_kernels.dora_linear(x, weight, bias, *arguments)[0]
