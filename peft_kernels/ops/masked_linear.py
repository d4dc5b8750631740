"""The op `masked_linear`: y = x (W ⊙ M)ᵀ + b, its gradients (of W inside the mask only), and its registration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.mask import PackedMask
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import Positions
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import row_bucket, rows, unflatten
from peft_kernels.ops._weights import Weight, joined, split
from peft_kernels.ops.lora_linear import autocast_together

SCHEMAS = {
    # weight and layout: what `_weights.split` makes of a dense weight or one of 4 bits; a dense one in any dtype.
    # words: of the PackedMask. clean: whether W is 0 outside the mask already.
    "masked_linear": (
        "(Tensor x, Tensor[] weight, int[] layout, Tensor words, bool clean, Tensor? bias) -> Tensor"
    ),
    # Gradients of (x, weight, bias, values): as many as `needs` asks for, in that order. That of `values` is the
    # weight's gradient at the places `flat` (and `starts`) of a Positions, in the dtype `values_dtype`.
    "masked_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor[] weight, int[] layout, Tensor words, bool clean, Tensor? flat,"
        " Tensor? starts, ScalarType? values_dtype, bool[4] needs) -> Tensor[]"
    ),
}  # fmt: skip


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two; `weight_dtype` is None for 4 bits; `clean`:
    whether the weight is 0 outside the mask already; `compact`: whether its gradient is gathered."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    m: int
    n: int
    k: int
    clean: bool
    compact: bool = False


def _problem(x: Tensor, weight: Weight, clean: bool, compact: bool = False) -> Problem:
    device, (n, k) = x.device, weight.shape
    dtype = None if isinstance(weight, NF4Weight) else weight.dtype
    return Problem(device.type, device.index, x.dtype, dtype, row_bucket(x), n, k, clean, compact)


def problem(x, weight, mask, bias=None, *, weight_is_masked=False, values=None, **_) -> Problem:
    return _problem(x, weight, weight_is_masked, values is not None)


def select(x: Tensor, weight: Weight, clean: bool, compact: bool = False):
    """The implementation for rows as those of `x` (dY in backward)."""
    dtype = None if isinstance(weight, NF4Weight) else weight.dtype
    key = (x.shape[:-1], x.dtype, x.device, weight.shape, dtype, clean, compact)
    return dispatch.select_memoised("masked_linear", key, _problem, x, weight, clean, compact)


def _forward(implementation, x, weight, words, clean, bias):
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if x.ndim == 2:
        return implementation.forward(x, weight, words, clean, bias)
    return unflatten(implementation.forward(rows(x), weight, words, clean, bias), x.shape[:-1])


def _backward(implementation, grad_y, x, weight, words, clean, places, values_dtype, needs):
    """Gradients of (x, weight, bias, values), None where `needs` says that nobody asked."""
    if grad_y.ndim == 2:
        return implementation.backward(grad_y, x, weight, words, clean, places, values_dtype, needs)
    flat = (t if t is None else rows(t) for t in (grad_y, x))
    grad_x, *others = implementation.backward(*flat, weight, words, clean, places, values_dtype, needs)
    return grad_x if grad_x is None else unflatten(grad_x, grad_y.shape[:-1]), *others


def _places(flat: Tensor | None, starts: Tensor | None, shape: torch.Size) -> Positions | None:
    return None if flat is None or starts is None else Positions(flat, starts, shape)


def kernel(x, weight, layout, words, clean, bias):
    (weight,) = joined(weight, layout, x.dtype)
    return _forward(select(x, weight, clean), x, weight, words, clean, bias)


def fake(x, weight, layout, words, clean, bias):
    return x.new_empty(*x.shape[:-1], words.shape[0])


def backward_kernel(grad_y, x, weight, layout, words, clean, flat, starts, values_dtype, needs):
    (weight,) = joined(weight, layout, grad_y.dtype)
    places = _places(flat, starts, weight.shape)
    implementation = select(grad_y, weight, clean, needs[3])
    grads = _backward(implementation, grad_y, x, weight, words, clean, places, values_dtype, needs)
    return [grad for grad in grads if grad is not None]


def backward_fake(grad_y, x, weight, layout, words, clean, flat, starts, values_dtype, needs):
    (whole,) = joined(weight, layout, grad_y.dtype)
    n, k = whole.shape
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    grads = []
    if needs[0]:
        grads.append(grad_y.new_empty(*grad_y.shape[:-1], k))
    if needs[1]:
        grads.append(grad_y.new_empty(n, k, dtype=whole.dtype))
    if needs[2]:
        grads.append(grad_y.new_empty(n, dtype=wide))
    if needs[3]:
        grads.append(grad_y.new_empty(flat.shape, dtype=values_dtype))
    return grads


KERNELS = {"masked_linear": (kernel, fake), "masked_linear_backward": (backward_kernel, backward_fake)}


class MaskedLinear(torch.autograd.Function):
    """Saves x where the weight trains, and references to the weight and its mask where x wants a gradient.

    `weight` is the first tensor of a weight of 4 bits, `others` are the rest. `values` lends its place to the compact
    gradient; its numbers are those of W at the places `flat` and are not read.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, values, words, clean, flat, starts, layout, *others):
        if is_plain(x):
            (whole,) = joined((weight, *others), layout, x.dtype)
            implementation = ctx.implementation = select(x, whole, clean, values is not None)
            y = _forward(implementation, x, whole, words, clean, bias)
        else:
            ctx.implementation = None
            y = torch.ops.peft_kernels.masked_linear(x, (weight, *others), layout, words, clean, bias)
        _, need_weight, _, need_values = ctx.needs_input_grad[:4]
        kept_x = x if need_weight or need_values else None
        ctx.save_for_backward(kept_x, words, flat if need_values else None, weight, *others)
        ctx.starts = starts  # on the host, and never written to
        ctx.clean, ctx.layout, ctx.values_dtype = clean, layout, None if values is None else values.dtype
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("masked_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:4]
    x, words, flat, *weight = saved
    starts = ctx.starts if needs[3] else None
    if ctx.implementation is not None and is_plain(grad_y):
        (whole,) = joined(weight, ctx.layout, grad_y.dtype)
        places = _places(flat, starts, whole.shape)
        grads = _backward(
            ctx.implementation, grad_y, x, whole, words, ctx.clean, places, ctx.values_dtype, needs
        )  # fmt: skip
    else:
        backward = torch.ops.peft_kernels.masked_linear_backward
        wanted = iter(backward(grad_y, x, weight, ctx.layout, words, ctx.clean, flat, starts, ctx.values_dtype, needs))
        grads = [next(wanted) if need else None for need in needs]
    return (*grads, *([None] * (4 + len(weight))))


def masked_linear(
    x: Tensor, weight: Weight, mask: PackedMask, bias: Tensor | None, clean: bool, values: Tensor | None,
    places: Positions | None,
) -> Tensor:  # fmt: skip
    """The op with autograd, for arguments that `functional.masked_linear` has checked."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        # A dense weight stays as it is: implementations round its masked pieces, and no copy of the whole is made.
        x, bias = autocast_together(x, bias)
        with torch.autocast(x.device.type, enabled=False):
            return masked_linear(x, weight, mask, bias, clean, values, places)
    (first,), others, layout = split((weight,))
    if not torch.is_grad_enabled():
        return torch.ops.peft_kernels.masked_linear(x, [first, *others], layout, mask.words, clean, bias)
    flat, starts = (None, None) if places is None else (places.flat, places.starts)
    return MaskedLinear.apply(x, first, bias, values, mask.words, clean, flat, starts, layout, *others)
