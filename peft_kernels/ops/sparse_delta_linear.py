"""The op `sparse_delta_linear`: y_m = x_m (W + Δ_i)ᵀ + b, i the delta of row m, its gradients and its registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import Positions
from peft_kernels.formats.sparse_delta import SparseDelta
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import row_bucket, rows, unflatten
from peft_kernels.ops._weights import Weight, cut, joined, split
from peft_kernels.ops.lora_linear import autocast_together

SCHEMAS = {
    # weight and layout: what `_weights.split` makes of a dense weight, in any dtype, or one of 4 bits. places: of each
    # delta flat, starts, order and column_starts of its Positions. ids: int64 [rows], -1 for W alone; None where all
    # rows have the one delta.
    "sparse_delta_linear": (
        "(Tensor x, Tensor[] weight, int[] layout, Tensor?[] places, Tensor[] values, Tensor? ids, Tensor? bias)"
        " -> Tensor"
    ),
    # Gradients of (x, weight, bias, values of each delta): as many as `needs` asks for, in that order.
    "sparse_delta_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor[] weight, int[] layout, Tensor?[] places, Tensor[] values, Tensor? ids,"
        " bool[] needs) -> Tensor[]"
    ),
}
PARTS = 4  # of a delta's places


class Problem(NamedTuple):
    """What dispatch chooses by. `m`, and `nnz`, the most places of a delta, are rounded up to powers of two;
    `weight_dtype` is None for 4 bits; `several`: whether rows choose among `deltas`."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    values_dtype: torch.dtype | None
    m: int
    n: int
    k: int
    nnz: int
    deltas: int
    several: bool


def _problem(x: Tensor, weight: Weight, deltas: Sequence[SparseDelta], several: bool) -> Problem:
    device, (n, k) = x.device, weight.shape
    dtype = None if isinstance(weight, NF4Weight) else weight.dtype
    values_dtype = deltas[0].values.dtype if deltas else None
    nnz = _bucket(deltas)
    return Problem(
        device.type, device.index, x.dtype, dtype, values_dtype, row_bucket(x), n, k, nnz, len(deltas), several
    )  # fmt: skip


def _bucket(deltas: Sequence[SparseDelta]) -> int:
    most = max((delta.values.numel() for delta in deltas), default=0)
    return 1 << (most - 1).bit_length() if most else 0


def problem(x, weight, indices, values, bias=None, *, delta_ids=None) -> Problem:
    from peft_kernels.functional.sparse_delta_linear import deltas_of

    return _problem(x, weight, deltas_of(weight, indices, values, delta_ids is not None), delta_ids is not None)


def select(x: Tensor, weight: Weight, deltas: Sequence[SparseDelta], several: bool):
    """The implementation for rows as those of `x` (dY in backward)."""
    dtype = None if isinstance(weight, NF4Weight) else weight.dtype
    values_dtype = deltas[0].values.dtype if deltas else None
    key = (
        x.shape[:-1], x.dtype, x.device, weight.shape, dtype, values_dtype, _bucket(deltas), len(deltas), several
    )  # fmt: skip
    return dispatch.select_memoised("sparse_delta_linear", key, _problem, x, weight, deltas, several)


def _deltas(places: Sequence[Any], values: Sequence[Tensor], shape: torch.Size) -> list[SparseDelta]:
    """The inverse of `_flat`."""
    deltas = []
    for i, own in enumerate(values):
        flat, starts, order, column_starts = places[PARTS * i : PARTS * (i + 1)]
        deltas.append(SparseDelta(Positions(flat, starts, torch.Size(shape), order, column_starts), own))
    return deltas


def _flat(deltas: Sequence[SparseDelta]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for places, _ in deltas:
        found += [places.flat, places.starts, places.order, places.column_starts]
    return found


def _forward(implementation, x, weight, deltas, ids, bias):
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if x.ndim == 2:
        return implementation.forward(x, weight, deltas, ids, bias)
    return unflatten(implementation.forward(rows(x), weight, deltas, ids, bias), x.shape[:-1])


def _backward(implementation, grad_y, x, weight, deltas, ids, needs):
    """Gradients of (x, weight, bias, values of each delta), None where `needs` says that nobody asked."""
    flat_x = None if x is None else rows(x)
    grad_x, grad_weight, grad_bias, grad_values = implementation.backward(
        rows(grad_y), flat_x, weight, deltas, ids, (*needs[:3], tuple(needs[3:]))
    )
    if grad_x is not None and grad_y.ndim != 2:
        grad_x = unflatten(grad_x, grad_y.shape[:-1])
    return grad_x, grad_weight, grad_bias, *grad_values


def kernel(x, weight, layout, places, values, ids, bias):
    (whole,) = joined(weight, layout, x.dtype)
    deltas = _deltas(places, values, whole.shape)
    return _forward(select(x, whole, deltas, ids is not None), x, whole, deltas, ids, bias)


def fake(x, weight, layout, places, values, ids, bias):
    (whole,) = joined(weight, layout, x.dtype)
    return x.new_empty(*x.shape[:-1], whole.shape[0])


def backward_kernel(grad_y, x, weight, layout, places, values, ids, needs):
    (whole,) = joined(weight, layout, grad_y.dtype)
    deltas = _deltas(places, values, whole.shape)
    implementation = select(grad_y, whole, deltas, ids is not None)
    grads = _backward(implementation, grad_y, x, whole, deltas, ids, needs)
    return [grad for grad in grads if grad is not None]


def backward_fake(grad_y, x, weight, layout, places, values, ids, needs):
    (whole,) = joined(weight, layout, grad_y.dtype)
    n, k = whole.shape
    like = [((*grad_y.shape[:-1], k), grad_y.dtype), ((n, k), whole.dtype)]
    like += [((n,), torch.promote_types(torch.float32, grad_y.dtype))]
    like += [(own.shape, own.dtype) for own in values]
    return [grad_y.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(like, needs, strict=True) if need]


KERNELS = {
    "sparse_delta_linear": (kernel, fake),
    "sparse_delta_linear_backward": (backward_kernel, backward_fake),
}


class SparseDeltaLinear(torch.autograd.Function):
    """Saves x where values or W train, the places where a gradient goes through them, and references to W and the
    values where x wants a gradient.

    `weight` is the first tensor of a weight of 4 bits. `tensors`: the values of each delta, the places of each, and
    what else a weight of 4 bits has.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, ids, layout, count, *tensors):
        values, places, others = cut(tensors, count, PARTS * count)
        if is_plain(x):
            (whole,) = joined((weight, *others), layout, x.dtype)
            deltas = _deltas(places, values, whole.shape)
            ctx.implementation = select(x, whole, deltas, ids is not None)
            y = _forward(ctx.implementation, x, whole, deltas, ids, bias)
        else:
            ctx.implementation = None
            y = torch.ops.peft_kernels.sparse_delta_linear(
                x, (weight, *others), layout, places, values, ids, bias
            )  # fmt: skip
        need_weight = ctx.needs_input_grad[1]
        need_values = any(ctx.needs_input_grad[6 : 6 + count])
        ctx.save_for_backward(
            x if need_weight or need_values else None, ids, weight, *values, *_on_device(places), *others
        )  # fmt: skip
        ctx.layout, ctx.count = layout, count
        ctx.on_host = places[1::PARTS], places[3::PARTS]  # never written to
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("sparse_delta_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _on_device(places: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [*places[0::PARTS], *places[2::PARTS]]


def _gradients(ctx, grad_y, saved):
    count = ctx.count
    needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6 : 6 + count]]
    (x, ids, weight), values, flats, orders, others = cut(saved, 3, count, count, count)
    parts = zip(flats, ctx.on_host[0], orders, ctx.on_host[1], strict=True)
    places = [part for parts_of_one in parts for part in parts_of_one]
    if ctx.implementation is not None and is_plain(grad_y):
        (whole,) = joined((weight, *others), ctx.layout, grad_y.dtype)
        deltas = _deltas(places, values, whole.shape)
        grads = _backward(ctx.implementation, grad_y, x, whole, deltas, ids, needs)
    else:
        backward = torch.ops.peft_kernels.sparse_delta_linear_backward
        wanted = iter(backward(grad_y, x, (weight, *others), ctx.layout, places, values, ids, needs))
        grads = [next(wanted) if need else None for need in needs]
    return (*grads[:3], None, None, None, *grads[3:], *([None] * (PARTS * count + len(others))))


def sparse_delta_linear(
    x: Tensor, weight: Weight, deltas: Sequence[SparseDelta], ids: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The op with autograd, for arguments that `functional.sparse_delta_linear` has checked."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        # W and Δ stay as they are: implementations round the pieces of their sum, and no copy of the whole is made.
        x, bias = autocast_together(x, bias)
        with torch.autocast(x.device.type, enabled=False):
            return sparse_delta_linear(x, weight, deltas, ids, bias)
    (first,), others, layout = split((weight,))
    values, places = [delta.values for delta in deltas], _flat(deltas)
    if not torch.is_grad_enabled():
        return torch.ops.peft_kernels.sparse_delta_linear(x, [first, *others], layout, places, values, ids, bias)
    return SparseDeltaLinear.apply(x, first, bias, ids, layout, len(deltas), *values, *places, *others)
