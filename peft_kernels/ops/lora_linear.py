"""The op `lora_linear`: y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ, its gradients, its registration and its autocast rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import row_bucket, rows, unflatten
from peft_kernels.ops._tracing import fold_scaling

SCHEMAS = {
    "lora_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p,"
        " Tensor? seed) -> (Tensor y, Tensor s)"
    ),
    # Gradients of (x, weight, bias, lora_A, lora_B): as many as `needs` asks for, in that order.
    "lora_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor? s, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling,"
        " float dropout_p, Tensor? seed, bool[5] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `n`, `k`, `r` are exact; `m` is rounded up to a power of two, so that varying batch
    sizes do not ask again and again."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    dropout: bool


def _problem(x: Tensor, lora_A: Tensor, lora_B: Tensor, dropout: bool) -> Problem:
    r, k = lora_A.shape
    device = x.device
    return Problem(device.type, device.index, x.dtype, lora_A.dtype, row_bucket(x), lora_B.shape[0], k, r, dropout)


def problem(x, weight, lora_A, lora_B, *, dropout_p=0.0, training=True, **_) -> Problem:
    if isinstance(weight, NF4Weight):
        raise ValueError("lora_linear: over an NF4Weight it is the op nf4_lora_linear; ask about that one")
    return _problem(x, lora_A, lora_B, training and dropout_p > 0)


def select(op, x, lora_A, lora_B, dropout):
    """The implementation of `op`, whose problem is that of `lora_linear`."""
    key = (x.shape, x.dtype, x.device, lora_A.shape, lora_A.dtype, lora_B.shape, dropout)
    return dispatch.select_memoised(op, key, _problem, x, lora_A, lora_B, dropout)


def run_forward(implementation, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)  # the sum of a base and an adapter bias, not yet rounded
    if x.ndim == 2:
        return implementation.forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    y, s = implementation.forward(rows(x), weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return unflatten(y, x.shape[:-1]), unflatten(s, x.shape[:-1])


def run_backward(implementation, grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    """Gradients of (x, weight, bias, lora_A, lora_B), None where `needs` says that nobody asked."""
    if grad_y.ndim == 2:
        return implementation.backward(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs)
    batch = grad_y.shape[:-1]
    flat = (t if t is None else rows(t) for t in (grad_y, x, s))
    grad_x, *others = implementation.backward(*flat, weight, lora_A, lora_B, scaling, dropout_p, seed, needs)
    return grad_x if grad_x is None else unflatten(grad_x, batch), *others


def kernel(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    implementation = select("lora_linear", x, lora_A, lora_B, seed is not None)
    return run_forward(implementation, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def fake(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    batch = x.shape[:-1]
    return x.new_empty(*batch, weight.shape[0]), x.new_empty(*batch, lora_A.shape[0])


def backward_kernel(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    implementation = select("lora_linear", grad_y, lora_A, lora_B, seed is not None)
    grads = run_backward(implementation, grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs)
    return [grad for grad in grads if grad is not None]


def backward_fake(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    batch, (n, k) = grad_y.shape[:-1], weight.shape
    shapes = ((*batch, k), (n, k), (n,), lora_A.shape, lora_B.shape)
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    dtypes = (grad_y.dtype, weight.dtype, wide, lora_A.dtype, lora_B.dtype)
    wanted = zip(shapes, dtypes, needs, strict=True)
    return [grad_y.new_empty(shape, dtype=dtype) for shape, dtype, need in wanted if need]


KERNELS = {"lora_linear": (kernel, fake), "lora_linear_backward": (backward_kernel, backward_fake)}


class LoraLinear(torch.autograd.Function):
    """Saves x, S and the seed (and references to the parameters), each only when some wanted gradient uses it."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
        if is_plain(x):
            ctx.implementation = implementation = select("lora_linear", x, lora_A, lora_B, seed is not None)
            y, s = run_forward(implementation, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        else:
            ctx.implementation = None
            y, s = torch.ops.peft_kernels.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        _, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
        saved_x = x if need_a or need_weight else None
        ctx.save_for_backward(saved_x, s if need_b else None, weight, lora_A, lora_B, seed)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("lora_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:5]
    x, s, weight, lora_A, lora_B, seed = saved
    if ctx.implementation is not None and is_plain(grad_y):
        grads = run_backward(
            ctx.implementation, grad_y, x, s, weight, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, needs
        )
        return *grads, None, None, None
    wanted = iter(
        torch.ops.peft_kernels.lora_linear_backward(
            grad_y, x, s, weight, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, needs
        )
    )
    return (*[next(wanted) if need else None for need in needs], None, None, None)


def autocast_together(*tensors):
    """The tensors in the autocast dtype of the first one's device, as `F.linear` would take them under autocast. What
    is no tensor (None, a weight of 4 bits) stays as it is."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _under_autocast(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    """As F.linear under autocast, x, W and b take the autocast dtype. A and B stay as they are: implementations cast
    them to x's dtype, and their gradients come from float32 sums without a rounding to 16 bits in between."""
    with torch.autocast(x.device.type, enabled=False):
        return lora_linear(*autocast_together(x, weight, bias), lora_A, lora_B, scaling, dropout_p, seed)


def lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    """The op with autograd, for arguments that `functional.lora_linear` has checked. `seed` is None without dropout."""
    lora_B, scaling = fold_scaling(lora_B, scaling)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return _under_autocast(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    if torch.is_grad_enabled():
        return LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return torch.ops.peft_kernels.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]
