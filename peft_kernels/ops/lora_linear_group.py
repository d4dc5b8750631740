"""The op `lora_linear_group`: several linear layers over one x, each with any number of low-rank updates.

y_j = x W_jᵀ + b_j + Σ_i s_i (drop_i(x) A_iᵀ) B_iᵀ over the adapters i with outputs[i] = j.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import owned, row_bucket, rows, unflatten
from peft_kernels.ops._tracing import distinct, fold_scalings
from peft_kernels.ops._weights import all_dense, cut, joined, split
from peft_kernels.ops.lora_linear import autocast_together

SCHEMAS = {
    # One entry of lora_As, lora_Bs, scalings, outputs and dropout_ps for each adapter; `outputs` ascends. s [..., Σ r].
    # weights and layouts: dense weights and none, or what `_weights.split` makes of some of 4 bits.
    "lora_linear_group": (
        "(Tensor x, Tensor[] weights, int[] layouts, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs,"
        " float[] scalings, int[] outputs, float[] dropout_ps, Tensor? seeds, Tensor? token_mask)"
        " -> (Tensor[] ys, Tensor s)"
    ),
    # Gradients of x, the weights, biases, As and Bs: as many as `needs` asks for, in that order. A grad_ys[j] that is
    # None stands for zeros.
    "lora_linear_group_backward": (
        "(Tensor?[] grad_ys, Tensor? x, Tensor? s, Tensor[] weights, int[] layouts, Tensor[] lora_As,"
        " Tensor[] lora_Bs, float[] scalings, int[] outputs, float[] dropout_ps, Tensor? seeds, Tensor? token_mask,"
        " bool[] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two; `ns` has one entry per output, `rs` and `outputs`
    one per adapter. `nf4`: whether any weight is of 4 bits."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None
    m: int
    ns: tuple[int, ...]
    k: int
    rs: tuple[int, ...]
    outputs: tuple[int, ...]
    dropout: bool
    token_mask: bool
    nf4: bool = False


class GroupNeeds(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]
    lora_As: tuple[bool, ...]
    lora_Bs: tuple[bool, ...]

    @classmethod
    def from_flat(cls, flat, outputs: int, adapters: int) -> GroupNeeds:
        flat = tuple(flat)
        a, b, c = 1 + outputs, 1 + 2 * outputs, 1 + 2 * outputs + adapters
        return cls(flat[0], flat[1:a], flat[a:b], flat[b:c], flat[c:])


def _problem(x: Tensor, weights, lora_As, outputs, dropout: bool, token_mask: bool) -> Problem:
    device = x.device
    return Problem(
        device.type,
        device.index,
        x.dtype,
        lora_As[0].dtype if lora_As else None,
        row_bucket(x),
        tuple(weight.shape[0] for weight in weights),
        weights[0].shape[1],
        tuple(a.shape[0] for a in lora_As),
        tuple(outputs),
        dropout,
        token_mask,
        not all_dense(weights),
    )


def problem(x, weights, lora_As, lora_Bs, *, dropout_p=0.0, training=True, token_mask=None, **_) -> Problem:
    from peft_kernels.functional.lora_linear_group import flat_adapters

    outputs, flat_As = flat_adapters(lora_As)
    dropout = training and (dropout_p if isinstance(dropout_p, (int, float)) else 1.0) > 0
    return _problem(x, weights, flat_As, outputs, dropout, token_mask is not None)


def select(x, weights, lora_As, outputs, dropout, token_mask):
    """The implementation for these tensors; `dropout` and `token_mask` say whether there are any."""
    shapes = (*(weight.shape for weight in weights), *(a.shape for a in lora_As))
    adapter_dtype = lora_As[0].dtype if lora_As else None
    dense = all_dense(weights)
    key = (x.shape[:-1], x.dtype, x.device, shapes, adapter_dtype, tuple(outputs), dropout, token_mask, dense)
    return dispatch.select_memoised(
        "lora_linear_group", key, _problem, x, weights, lora_As, outputs, dropout, token_mask
    )


def _forward(implementation, x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask):
    batch = x.shape[:-1]
    if token_mask is not None:
        token_mask = token_mask.reshape(-1)
    biases = [b if b is None or b.dtype == x.dtype else b.to(x.dtype) for b in biases]
    ys, s = implementation.forward(
        rows(x), weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask
    )
    if x.ndim == 2:
        return ys, s
    return [unflatten(y, batch) for y in ys], unflatten(s, batch)


def _backward(
    implementation, grad_ys, x, s, weights, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask, needs
) -> list[Tensor | None]:
    """Gradients in the order of GroupNeeds, None where nobody asked."""
    given = next(grad for grad in grad_ys if grad is not None)
    flat = [None if t is None else rows(t) for t in (*grad_ys, x, s)]
    *flat_grad_ys, flat_x, flat_s = flat
    if token_mask is not None:
        token_mask = token_mask.reshape(-1)
    grad_x, *others = implementation.backward(
        flat_grad_ys, flat_x, flat_s, weights, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask, needs
    )
    if grad_x is not None and given.ndim != 2:
        grad_x = unflatten(grad_x, given.shape[:-1])
    return [grad_x, *(grad for grads in others for grad in grads)]


def kernel(x, weights, layouts, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask):
    weights = joined(weights, layouts, x.dtype)
    implementation = select(x, weights, lora_As, outputs, seeds is not None, token_mask is not None)
    return _forward(
        implementation, x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask
    )


def fake(x, weights, layouts, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask):
    batch, weights = x.shape[:-1], joined(weights, layouts, x.dtype)
    ranks = sum(a.shape[0] for a in lora_As)
    return [x.new_empty(*batch, weight.shape[0]) for weight in weights], x.new_empty(*batch, ranks)


def backward_kernel(
    grad_ys, x, s, weights, layouts, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask, needs
):  # fmt: skip
    given = next(grad for grad in grad_ys if grad is not None)
    weights = joined(weights, layouts, given.dtype)
    implementation = select(given, weights, lora_As, outputs, seeds is not None, token_mask is not None)
    grads = _backward(
        implementation, grad_ys, x, s, weights, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask,
        GroupNeeds.from_flat(needs, len(weights), len(lora_As)),
    )  # fmt: skip
    # An op's results must not share memory; gradients that were computed side by side do.
    return [owned(grad) for grad in grads if grad is not None]


def backward_fake(
    grad_ys, x, s, weights, layouts, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask, needs
):  # fmt: skip
    given = next(grad for grad in grad_ys if grad is not None)
    weights = joined(weights, layouts, given.dtype)
    wide = torch.promote_types(torch.float32, given.dtype)
    like = [((*given.shape[:-1], weights[0].shape[1]), given.dtype)]
    like += [(weight.shape, weight.dtype) for weight in weights]
    like += [((weight.shape[0],), wide) for weight in weights]
    like += [(t.shape, t.dtype) for t in (*lora_As, *lora_Bs)]
    return [given.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(like, needs, strict=True) if need]


KERNELS = {"lora_linear_group": (kernel, fake), "lora_linear_group_backward": (backward_kernel, backward_fake)}


class LoraLinearGroup(torch.autograd.Function):
    """Saves x, S and the seeds once for all projections, each only when some wanted gradient uses it. `tensors` are the
    weights (of those of 4 bits the first tensor), the biases, the As, the Bs and the other tensors of the weights."""

    @staticmethod
    def forward(ctx, x, seeds, token_mask, scalings, outputs, dropout_ps, count, layouts, *tensors):
        firsts, biases, lora_As, lora_Bs, others = cut(tensors, count, count, len(outputs), len(outputs))
        weights = joined((*firsts, *others), layouts, x.dtype)
        arguments = (biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask)
        if is_plain(x):
            ctx.implementation = select(x, weights, lora_As, outputs, seeds is not None, token_mask is not None)
            ys, s = _forward(ctx.implementation, x, weights, *arguments)
        else:
            ctx.implementation = None
            ys, s = torch.ops.peft_kernels.lora_linear_group(x, (*firsts, *others), layouts, *arguments)
        needs = GroupNeeds.from_flat(_wanted(ctx, others), count, len(outputs))
        saved_x = x if any(needs.lora_As) or any(needs.weights) else None
        saved_s = s if any(needs.lora_Bs) else None
        ctx.save_for_backward(saved_x, saved_s, seeds, token_mask, *firsts, *lora_As, *lora_Bs, *others)
        ctx.scalings, ctx.outputs, ctx.dropout_ps = scalings, outputs, dropout_ps
        ctx.count, ctx.layouts = count, layouts
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grad_ys):
        if all(grad is None for grad in grad_ys):
            return (None,) * len(ctx.needs_input_grad)
        return first_gradients("lora_linear_group", _gradients, ctx, grad_ys, ctx.saved_tensors)


def _wanted(ctx, others) -> tuple[bool, ...]:
    """Whether a gradient is wanted of x, each weight, bias, A and B."""
    wanted = ctx.needs_input_grad
    return (wanted[0], *wanted[8 : len(wanted) - len(others)])


def _gradients(ctx, grad_ys, saved):
    count, adapters = ctx.count, len(ctx.outputs)
    x, s, seeds, token_mask, *parameters = saved
    firsts, lora_As, lora_Bs, others = cut(parameters, count, adapters, adapters)
    flat_needs = _needs_of_used(ctx, grad_ys, others)
    arguments = (lora_As, lora_Bs, ctx.scalings, ctx.outputs, ctx.dropout_ps, seeds, token_mask)
    given = [grad for grad in grad_ys if grad is not None]
    if ctx.implementation is not None and all(map(is_plain, given)):
        weights = joined((*firsts, *others), ctx.layouts, given[0].dtype)
        needs = GroupNeeds.from_flat(flat_needs, count, adapters)
        grads = _backward(ctx.implementation, grad_ys, x, s, weights, *arguments, needs)
    else:
        backward = torch.ops.peft_kernels.lora_linear_group_backward
        wanted = iter(backward(list(grad_ys), x, s, (*firsts, *others), ctx.layouts, *arguments, flat_needs))
        grads = [next(wanted) if need else None for need in flat_needs]
    return (grads[0], *([None] * 7), *grads[1:], *([None] * len(others)))


def _needs_of_used(ctx, grad_ys, others) -> tuple[bool, ...]:
    """What is wanted, less the parameters of projections whose y nobody used: those get no gradient, not zeros."""
    used = [grad is not None for grad in grad_ys]
    per_adapter = [used[output] for output in ctx.outputs]
    return tuple(map(operator.and_, _wanted(ctx, others), (True, *used, *used, *per_adapter, *per_adapter)))


def _under_autocast(x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask):
    """As in `lora_linear`: x, W and b take the autocast dtype, A and B stay as they are, and W of 4 bits too."""
    x, *others = autocast_together(x, *weights, *biases)
    weights, biases = others[: len(weights)], others[len(weights) :]
    with torch.autocast(x.device.type, enabled=False):
        return lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask)


def lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask):
    """The op with autograd, for arguments that `functional.lora_linear_group` has checked and flattened."""
    lora_Bs, scalings = fold_scalings(lora_Bs, scalings)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return _under_autocast(x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask)
    firsts, others, layouts = split(weights)
    if torch.is_grad_enabled():
        tensors, count = distinct((*firsts, *biases, *lora_As, *lora_Bs, *others)), len(weights)
        return LoraLinearGroup.apply(x, seeds, token_mask, scalings, outputs, dropout_ps, count, layouts, *tensors)
    ys, _ = torch.ops.peft_kernels.lora_linear_group(
        x, [*firsts, *others], layouts, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask
    )
    return tuple(ys)
