"""The op `nf4_lora_linear`: y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ with W in 4 bits, frozen, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.nf4 import NF4Weight, from_layout
from peft_kernels.ops import lora_linear
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import row_bucket
from peft_kernels.ops._tracing import fold_scaling

SCHEMAS = {
    # q and layout: `tensors` and `layout` of an NF4Weight.
    "nf4_lora_linear": (
        "(Tensor x, Tensor[] q, int[] layout, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling,"
        " float dropout_p, Tensor? seed) -> (Tensor y, Tensor s)"
    ),
    # Gradients of (x, bias, lora_A, lora_B): as many as `needs` asks for, in that order.
    "nf4_lora_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor? s, Tensor[] q, int[] layout, Tensor lora_A, Tensor lora_B, float scaling,"
        " float dropout_p, Tensor? seed, bool[4] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    dropout: bool
    blocksize: int
    nested: bool


def _problem(x: Tensor, q: NF4Weight, lora_A: Tensor, dropout: bool) -> Problem:
    device, (n, k, *_), r = x.device, q.layout, lora_A.shape[0]
    return Problem(
        device.type, device.index, x.dtype, lora_A.dtype, row_bucket(x), n, k, r, dropout, q.blocksize, q.is_nested
    )


def problem(x, q, lora_A, lora_B, *, dropout_p=0.0, training=True, **_) -> Problem:
    return _problem(x, q, lora_A, training and dropout_p > 0)


def select(x, q, lora_A, dropout):
    """The implementation for rows as those of `x` (dY in backward), this weight and adapter."""
    key = (x.shape[:-1], x.dtype, x.device, *q.layout, lora_A.shape, lora_A.dtype, dropout)
    return dispatch.select_memoised("nf4_lora_linear", key, _problem, x, q, lora_A, dropout)


def _needs(needs) -> tuple[bool, ...]:
    """Of (x, bias, lora_A, lora_B) as of (x, weight, bias, lora_A, lora_B): the implementations are those of
    `lora_linear`, with a weight that wants no gradient."""
    need_x, *others = needs
    return (need_x, False, *others)


def _without_weight(grads) -> tuple:
    grad_x, _, *others = grads
    return (grad_x, *others)


def kernel(x, q, layout, bias, lora_A, lora_B, scaling, dropout_p, seed):
    weight = from_layout(q, layout, x.dtype)
    implementation = select(x, weight, lora_A, seed is not None)
    return lora_linear.run_forward(implementation, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def fake(x, q, layout, bias, lora_A, lora_B, scaling, dropout_p, seed):
    batch = x.shape[:-1]
    return x.new_empty(*batch, layout[0]), x.new_empty(*batch, lora_A.shape[0])


def backward_kernel(grad_y, x, s, q, layout, lora_A, lora_B, scaling, dropout_p, seed, needs):
    weight = from_layout(q, layout, grad_y.dtype)
    implementation = select(grad_y, weight, lora_A, seed is not None)
    grads = lora_linear.run_backward(
        implementation, grad_y, x, s, weight, lora_A, lora_B, scaling, dropout_p, seed, _needs(needs)
    )
    return [grad for grad in _without_weight(grads) if grad is not None]


def backward_fake(grad_y, x, s, q, layout, lora_A, lora_B, scaling, dropout_p, seed, needs):
    batch, (n, k, *_) = grad_y.shape[:-1], layout
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    shapes = ((*batch, k), (n,), lora_A.shape, lora_B.shape)
    dtypes = (grad_y.dtype, wide, lora_A.dtype, lora_B.dtype)
    wanted = zip(shapes, dtypes, needs, strict=True)
    return [grad_y.new_empty(shape, dtype=dtype) for shape, dtype, need in wanted if need]


KERNELS = {"nf4_lora_linear": (kernel, fake), "nf4_lora_linear_backward": (backward_kernel, backward_fake)}


class Nf4LoraLinear(torch.autograd.Function):
    """Saves x, S and the seed (and references to the weight and the parameters), each only when some wanted gradient
    uses it. The dense weight is never kept."""

    @staticmethod
    def forward(ctx, x, bias, lora_A, lora_B, scaling, dropout_p, seed, layout, *q):
        if is_plain(x):
            weight = from_layout(q, layout, x.dtype)
            ctx.implementation = implementation = select(x, weight, lora_A, seed is not None)
            arguments = (x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
            y, s = lora_linear.run_forward(implementation, *arguments)
        else:
            ctx.implementation = None
            y, s = torch.ops.peft_kernels.nf4_lora_linear(x, q, layout, bias, lora_A, lora_B, scaling, dropout_p, seed)
        _, _, need_a, need_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(x if need_a else None, s if need_b else None, lora_A, lora_B, seed, *q)
        ctx.scaling, ctx.dropout_p, ctx.layout = scaling, dropout_p, layout
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("nf4_lora_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:4]
    x, s, lora_A, lora_B, seed, *q = saved
    options = (lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed)
    if ctx.implementation is not None and is_plain(grad_y):
        weight = from_layout(q, ctx.layout, grad_y.dtype)
        grads = _without_weight(
            lora_linear.run_backward(ctx.implementation, grad_y, x, s, weight, *options, _needs(needs))
        )
    else:
        wanted = iter(torch.ops.peft_kernels.nf4_lora_linear_backward(grad_y, x, s, q, ctx.layout, *options, needs))
        grads = tuple(next(wanted) if need else None for need in needs)
    return (*grads, None, None, None, None, *([None] * len(q)))


def nf4_lora_linear(x, q: NF4Weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    """The op with autograd, for arguments that `functional.nf4_lora_linear` has checked. `seed` is None without
    dropout."""
    lora_B, scaling = fold_scaling(lora_B, scaling)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        device = x.device.type
        x, bias = lora_linear.autocast_together(x, bias)
        with torch.autocast(device, enabled=False):
            return nf4_lora_linear(x, q, bias, lora_A, lora_B, scaling, dropout_p, seed)
    if torch.is_grad_enabled():
        return Nf4LoraLinear.apply(x, bias, lora_A, lora_B, scaling, dropout_p, seed, q.layout, *q.tensors)
    return torch.ops.peft_kernels.nf4_lora_linear(
        x, q.tensors, q.layout, bias, lora_A, lora_B, scaling, dropout_p, seed
    )[0]
