"""The op `masked_lora_linear`: a frozen pruned weight with a low-rank update beside it or inside its mask."""

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
from peft_kernels.ops._weights import Weight, joined, split
from peft_kernels.ops.lora_linear import autocast_together

SCHEMAS = {
    # weight, layout, words, clean: as of `masked_linear`. s = drop(x) Aᵀ; no columns where the update is masked.
    "masked_lora_linear": (
        "(Tensor x, Tensor[] weight, int[] layout, Tensor words, bool clean, Tensor? bias, Tensor lora_A,"
        " Tensor lora_B, float scaling, float dropout_p, Tensor? seed, bool update_masked) -> (Tensor y, Tensor s)"
    ),
    # Gradients of (x, bias, lora_A, lora_B): as many as `needs` asks for, in that order.
    "masked_lora_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor? s, Tensor[] weight, int[] layout, Tensor words, bool clean, Tensor lora_A,"
        " Tensor lora_B, float scaling, float dropout_p, Tensor? seed, bool update_masked, bool[4] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two; `weight_dtype` is None for 4 bits; `clean`:
    whether the weight is 0 outside the mask already."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    adapter_dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    clean: bool
    update_masked: bool
    dropout: bool


def _dtype(weight: Weight) -> torch.dtype | None:
    return None if isinstance(weight, NF4Weight) else weight.dtype


def _problem(x: Tensor, weight: Weight, lora_A: Tensor, clean: bool, update_masked: bool, dropout: bool) -> Problem:
    device, (n, k), r = x.device, weight.shape, lora_A.shape[0]
    return Problem(
        device.type, device.index, x.dtype, _dtype(weight), lora_A.dtype, row_bucket(x), n, k, r, clean, update_masked,
        dropout,
    )  # fmt: skip


def problem(
    x, weight, mask, lora_A, lora_B, *, dropout_p=0.0, training=True, update_masked=False, weight_is_masked=False, **_
) -> Problem:  # fmt: skip
    return _problem(x, weight, lora_A, weight_is_masked, update_masked, training and dropout_p > 0)


def select(x, weight, lora_A, clean, update_masked, dropout):
    """The implementation for rows as those of `x` (dY in backward), this weight and adapter."""
    options = (clean, update_masked, dropout)
    key = (x.shape[:-1], x.dtype, x.device, weight.shape, _dtype(weight), lora_A.shape[0], lora_A.dtype, *options)
    return dispatch.select_memoised("masked_lora_linear", key, _problem, x, weight, lora_A, *options)


def _forward(implementation, x, weight, words, clean, bias, *others):
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if x.ndim == 2:
        return implementation.forward(x, weight, words, clean, bias, *others)
    y, s = implementation.forward(rows(x), weight, words, clean, bias, *others)
    return unflatten(y, x.shape[:-1]), unflatten(s, x.shape[:-1])


def _backward(implementation, grad_y, x, s, *others):
    """Gradients of (x, bias, lora_A, lora_B), None where nobody asked."""
    if grad_y.ndim == 2:
        return implementation.backward(grad_y, x, s, *others)
    flat = (t if t is None else rows(t) for t in (grad_y, x, s))
    grad_x, *grads = implementation.backward(*flat, *others)
    return grad_x if grad_x is None else unflatten(grad_x, grad_y.shape[:-1]), *grads


def kernel(x, weight, layout, words, clean, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked):
    (weight,) = joined(weight, layout, x.dtype)
    implementation = select(x, weight, lora_A, clean, update_masked, seed is not None)
    return _forward(
        implementation, x, weight, words, clean, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked
    )


def fake(x, weight, layout, words, clean, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked):
    batch = x.shape[:-1]
    return x.new_empty(*batch, words.shape[0]), x.new_empty(*batch, 0 if update_masked else lora_A.shape[0])


def backward_kernel(
    grad_y, x, s, weight, layout, words, clean, lora_A, lora_B, scaling, dropout_p, seed, update_masked, needs
):
    (weight,) = joined(weight, layout, grad_y.dtype)
    implementation = select(grad_y, weight, lora_A, clean, update_masked, seed is not None)
    grads = _backward(
        implementation, grad_y, x, s, weight, words, clean, lora_A, lora_B, scaling, dropout_p, seed, update_masked,
        needs,
    )  # fmt: skip
    return [grad for grad in grads if grad is not None]


def backward_fake(
    grad_y, x, s, weight, layout, words, clean, lora_A, lora_B, scaling, dropout_p, seed, update_masked, needs
):
    batch, n = grad_y.shape[:-1], words.shape[0]
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    shapes = ((*batch, lora_A.shape[1]), (n,), lora_A.shape, lora_B.shape)
    dtypes = (grad_y.dtype, wide, lora_A.dtype, lora_B.dtype)
    wanted = zip(shapes, dtypes, needs, strict=True)
    return [grad_y.new_empty(shape, dtype=dtype) for shape, dtype, need in wanted if need]


KERNELS = {
    "masked_lora_linear": (kernel, fake),
    "masked_lora_linear_backward": (backward_kernel, backward_fake),
}


class MaskedLoraLinear(torch.autograd.Function):
    """Saves the seed and x or S, each only when some wanted gradient uses it. `weight` is the first tensor of a weight
    of 4 bits, `others` are the rest."""

    @staticmethod
    def forward(
        ctx, x, bias, lora_A, lora_B, words, clean, scaling, dropout_p, seed, update_masked, layout, *weight
    ):  # fmt: skip
        arguments = (words, clean, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked)
        if is_plain(x):
            (whole,) = joined(weight, layout, x.dtype)
            ctx.implementation = select(x, whole, lora_A, clean, update_masked, seed is not None)
            y, s = _forward(ctx.implementation, x, whole, *arguments)
        else:
            ctx.implementation = None
            y, s = torch.ops.peft_kernels.masked_lora_linear(x, weight, layout, *arguments)
        _, _, need_a, need_b = ctx.needs_input_grad[:4]
        kept_x = x if need_a or (need_b and update_masked) else None
        kept_s = s if need_b and not update_masked else None
        ctx.save_for_backward(kept_x, kept_s, words, lora_A, lora_B, seed, *weight)
        ctx.options = (clean, scaling, dropout_p, update_masked, layout)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("masked_lora_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:4]
    clean, scaling, dropout_p, update_masked, layout = ctx.options
    x, s, words, lora_A, lora_B, seed, *weight = saved
    arguments = (words, clean, lora_A, lora_B, scaling, dropout_p, seed, update_masked, needs)
    if ctx.implementation is not None and is_plain(grad_y):
        (whole,) = joined(weight, layout, grad_y.dtype)
        grads = _backward(ctx.implementation, grad_y, x, s, whole, *arguments)
    else:
        backward = torch.ops.peft_kernels.masked_lora_linear_backward
        wanted = iter(backward(grad_y, x, s, weight, layout, *arguments))
        grads = [next(wanted) if need else None for need in needs]
    return (*grads, *([None] * (7 + len(weight))))


def masked_lora_linear(
    x, weight, mask, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked, clean
) -> Tensor:  # fmt: skip
    """The op with autograd, for arguments that `functional.masked_lora_linear` has checked. `seed` is None without
    dropout."""
    lora_B, scaling = fold_scaling(lora_B, scaling)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        # W stays as it is, its masked pieces are rounded; A and B stay too, as in `lora_linear`.
        x, bias = autocast_together(x, bias)
        with torch.autocast(x.device.type, enabled=False):
            return masked_lora_linear(
                x, weight, mask, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked, clean
            )
    (first,), others, layout = split((weight,))
    if torch.is_grad_enabled():
        return MaskedLoraLinear.apply(
            x, bias, lora_A, lora_B, mask.words, clean, scaling, dropout_p, seed, update_masked, layout, first, *others
        )
    return torch.ops.peft_kernels.masked_lora_linear(
        x, [first, *others], layout, mask.words, clean, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked
    )[0]
