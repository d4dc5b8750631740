"""The op `lora_linear`: y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ, its gradients, its registration and its autocast rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.ops._eager import is_plain

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


def _problem(rows: Tensor, lora_A: Tensor, lora_B: Tensor, dropout: bool) -> Problem:
    device = rows.device
    m = rows.numel() // max(1, rows.shape[-1])
    r, k = lora_A.shape
    bucket = 1 << (m - 1).bit_length() if m > 0 else 0
    return Problem(device.type, device.index, rows.dtype, lora_A.dtype, bucket, lora_B.shape[0], k, r, dropout)


def problem(x, weight, lora_A, lora_B, *, dropout_p=0.0, training=True, **_) -> Problem:
    return _problem(x, lora_A, lora_B, training and dropout_p > 0)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.ndim == 1 else tensor.flatten(0, -2)


def _unflatten(rows: Tensor, batch: torch.Size) -> Tensor:
    # An ordinary view would make autograd refuse in-place changes of the result; nothing else holds `rows`.
    return torch.ops.aten._unsafe_view(rows, (*batch, rows.shape[-1]))


def _select(rows, lora_A, lora_B, dropout):
    key = (rows.shape, rows.dtype, rows.device, lora_A.shape, lora_A.dtype, lora_B.shape, dropout)
    return dispatch.select_memoised("lora_linear", key, _problem, rows, lora_A, lora_B, dropout)


def _forward(implementation, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    if x.ndim == 2:
        return implementation.forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    y, s = implementation.forward(_rows(x), weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return _unflatten(y, x.shape[:-1]), _unflatten(s, x.shape[:-1])


def _backward(implementation, grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    """Gradients of (x, weight, bias, lora_A, lora_B), None where `needs` says that nobody asked."""
    if grad_y.ndim == 2:
        return implementation.backward(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs)
    batch = grad_y.shape[:-1]
    rows = (t if t is None else _rows(t) for t in (grad_y, x, s))
    grad_x, *others = implementation.backward(*rows, weight, lora_A, lora_B, scaling, dropout_p, seed, needs)
    return grad_x if grad_x is None else _unflatten(grad_x, batch), *others


def kernel(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    implementation = _select(x, lora_A, lora_B, seed is not None)
    return _forward(implementation, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def fake(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    batch = x.shape[:-1]
    return x.new_empty(*batch, weight.shape[0]), x.new_empty(*batch, lora_A.shape[0])


def backward_kernel(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    implementation = _select(grad_y, lora_A, lora_B, seed is not None)
    grads = _backward(implementation, grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs)
    return [grad for grad in grads if grad is not None]


def backward_fake(grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, needs):
    batch, (n, k) = grad_y.shape[:-1], weight.shape
    shapes = ((*batch, k), (n, k), (n,), lora_A.shape, lora_B.shape)
    dtypes = (grad_y.dtype, weight.dtype, grad_y.dtype, lora_A.dtype, lora_B.dtype)
    rows = zip(shapes, dtypes, needs, strict=True)
    return [grad_y.new_empty(shape, dtype=dtype) for shape, dtype, need in rows if need]


KERNELS = {"lora_linear": (kernel, fake), "lora_linear_backward": (backward_kernel, backward_fake)}


class LoraLinear(torch.autograd.Function):
    """Saves x, S and the seed (and references to the parameters), each only when some wanted gradient uses it."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
        if is_plain(x):
            ctx.implementation = implementation = _select(x, lora_A, lora_B, seed is not None)
            y, s = _forward(implementation, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
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
        saved = ctx.saved_tensors
        if torch._C._is_any_autocast_enabled():  # the forward's casts are done; here they would round float32 sums
            with torch.autocast(grad_y.device.type, enabled=False):
                return _first_gradients(ctx, grad_y, saved)
        return _first_gradients(ctx, grad_y, saved)


def _first_gradients(ctx, grad_y, saved):
    if not torch.is_grad_enabled():
        return _gradients(ctx, grad_y, saved)
    with torch.no_grad():
        grads = _gradients(ctx, grad_y, saved)
    return _guarded(grads, grad_y, saved)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:5]
    x, s, weight, lora_A, lora_B, seed = saved
    if ctx.implementation is not None and is_plain(grad_y):
        grads = _backward(
            ctx.implementation, grad_y, x, s, weight, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, needs
        )
        return *grads, None, None, None
    wanted = iter(
        torch.ops.peft_kernels.lora_linear_backward(
            grad_y, x, s, weight, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, needs
        )
    )
    return (*[next(wanted) if need else None for need in needs], None, None, None)


class _NotTwice(torch.autograd.Function):
    """Identity on the first `count` tensors. The others are what those depend on: they connect the graph to the
    parameters. `once_differentiable` connects grad_y only: with y.sum(), whose grad_y is constant, a gradient penalty
    would vanish from the parameters' gradients without a word."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tensors[:count]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "lora_linear: tried to differentiate twice, which is not supported: x Aᵀ is saved as a constant. "
            "For gradient penalties compute the layer from F.linear instead"
        )


def _guarded(grads, grad_y, saved):
    """Under create_graph=True: gradients that refuse to be differentiated again."""
    present = [grad for grad in grads if grad is not None]
    used = [tensor for tensor in saved if tensor is not None]
    guarded = iter(_NotTwice.apply(len(present), *present, grad_y, *used))
    return tuple(None if grad is None else next(guarded) for grad in grads)


def _under_autocast(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    """As F.linear under autocast, x, W and b take the autocast dtype. A and B stay as they are: implementations cast
    them to x's dtype, and their gradients come from float32 sums without a rounding to 16 bits in between."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    x, weight, bias = (
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, weight, bias)
    )
    with torch.autocast(device, enabled=False):
        return lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    """The op with autograd, for arguments that `functional.lora_linear` has checked. `seed` is None without dropout."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return _under_autocast(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    if torch.is_grad_enabled():
        return LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return torch.ops.peft_kernels.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]
