"""The op `lora_swiglu_mlp`: y = down(act(gate(x)) ⊙ up(x)), three linear layers with low-rank updates."""

from __future__ import annotations

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
from peft_kernels.ops.lora_linear_group import GroupNeeds

SCHEMAS = {
    # weights and biases of (gate, up, down); one entry of lora_As ... dropout_ps for each adapter, `outputs` ascends.
    # weights and layouts: three dense weights and none, or what `_weights.split` makes of some of 4 bits.
    # gate and up are the results of those layers, s and s_down the products of rank r over x and over the activation.
    "lora_swiglu_mlp": (
        "(Tensor x, Tensor[] weights, int[] layouts, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs,"
        " float[] scalings, int[] outputs, str activation, float[] dropout_ps, Tensor? seeds)"
        " -> (Tensor y, Tensor gate, Tensor up, Tensor s, Tensor s_down)"
    ),
    # Gradients of x, the weights, biases, As and Bs: as many as `needs` asks for, in that order.
    "lora_swiglu_mlp_backward": (
        "(Tensor grad_y, Tensor? x, Tensor gate, Tensor up, Tensor? s, Tensor? s_down, Tensor[] weights,"
        " int[] layouts, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings, int[] outputs, str activation,"
        " float[] dropout_ps, Tensor? seeds, bool[] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two; `nf4`: whether any weight is of 4 bits."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None
    m: int
    hidden: int
    intermediate: int
    rs: tuple[int, ...]
    dropout: bool
    activation: str
    nf4: bool = False


def _problem(x, weights, lora_As, activation, dropout) -> Problem:
    device, (intermediate, hidden) = x.device, weights[0].shape
    adapter_dtype = lora_As[0].dtype if lora_As else None
    rs, nf4 = tuple(a.shape[0] for a in lora_As), not all_dense(weights)
    return Problem(
        device.type, device.index, x.dtype, adapter_dtype, row_bucket(x), hidden, intermediate, rs, dropout, activation,
        nf4,
    )  # fmt: skip


def problem(x, weights, lora_As, lora_Bs, *, dropout_p=0.0, training=True, activation="silu", **_) -> Problem:
    from peft_kernels.functional.lora_linear_group import flat_adapters

    dropout = training and (dropout_p if isinstance(dropout_p, (int, float)) else 1.0) > 0
    return _problem(x, weights, flat_adapters(lora_As)[1], activation, dropout)


def _select(x, weights, lora_As, activation, dropout):
    shapes = (*(weight.shape for weight in weights), *(a.shape for a in lora_As))
    adapter_dtype = lora_As[0].dtype if lora_As else None
    key = (x.shape[:-1], x.dtype, x.device, shapes, adapter_dtype, activation, dropout, not all_dense(weights))
    return dispatch.select_memoised("lora_swiglu_mlp", key, _problem, x, weights, lora_As, activation, dropout)


def _forward(implementation, x, weights, biases, *others):
    biases = [b if b is None or b.dtype == x.dtype else b.to(x.dtype) for b in biases]
    results = implementation.forward(rows(x), weights, biases, *others)
    return results if x.ndim == 2 else tuple(unflatten(t, x.shape[:-1]) for t in results)


def _backward(implementation, grad_y, x, gate, up, s, s_down, weights, *others) -> list[Tensor | None]:
    flat = (t if t is None else rows(t) for t in (grad_y, x, gate, up, s, s_down))
    grad_x, *grads = implementation.backward(*flat, weights, *others)
    if grad_x is not None and grad_y.ndim != 2:
        grad_x = unflatten(grad_x, grad_y.shape[:-1])
    return [grad_x, *(grad for kind in grads for grad in kind)]


def kernel(x, weights, layouts, biases, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps, seeds):
    weights = joined(weights, layouts, x.dtype)
    implementation = _select(x, weights, lora_As, activation, seeds is not None)
    return _forward(
        implementation, x, weights, biases, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps, seeds
    )


def fake(x, weights, layouts, biases, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps, seeds):
    weights = joined(weights, layouts, x.dtype)
    batch, intermediate = x.shape[:-1], weights[0].shape[0]
    down_ranks = sum(a.shape[0] for a, output in zip(lora_As, outputs, strict=True) if output == 2)
    ranks = sum(a.shape[0] for a in lora_As) - down_ranks
    sizes = (weights[2].shape[0], intermediate, intermediate, ranks, down_ranks)
    return tuple(x.new_empty(*batch, size) for size in sizes)


def backward_kernel(
    grad_y, x, gate, up, s, s_down, weights, layouts, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps,
    seeds, needs,
):  # fmt: skip
    weights = joined(weights, layouts, grad_y.dtype)
    implementation = _select(grad_y, weights, lora_As, activation, seeds is not None)
    grads = _backward(
        implementation, grad_y, x, gate, up, s, s_down, weights, lora_As, lora_Bs, scalings, outputs, activation,
        dropout_ps, seeds, GroupNeeds.from_flat(needs, 3, len(lora_As)),
    )  # fmt: skip
    # An op's results must not share memory; gradients that were computed side by side do.
    return [owned(grad) for grad in grads if grad is not None]


def backward_fake(
    grad_y, x, gate, up, s, s_down, weights, layouts, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps,
    seeds, needs,
):  # fmt: skip
    weights = joined(weights, layouts, grad_y.dtype)
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    like = [((*grad_y.shape[:-1], weights[0].shape[1]), grad_y.dtype)]
    like += [(weight.shape, weight.dtype) for weight in weights]
    like += [((weight.shape[0],), wide) for weight in weights]
    like += [(t.shape, t.dtype) for t in (*lora_As, *lora_Bs)]
    return [grad_y.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(like, needs, strict=True) if need]


KERNELS = {"lora_swiglu_mlp": (kernel, fake), "lora_swiglu_mlp_backward": (backward_kernel, backward_fake)}


class LoraSwigluMlp(torch.autograd.Function):
    """Saves x, gate(x), up(x), the products of rank r and the seeds. `tensors` are the weights (of those of 4 bits the
    first tensor), the biases, the As, the Bs and the other tensors of the weights."""

    @staticmethod
    def forward(ctx, x, seeds, scalings, outputs, activation, dropout_ps, layouts, *tensors):
        adapters = len(outputs)
        firsts, biases, lora_As, lora_Bs, others = cut(tensors, 3, 3, adapters, adapters)
        arguments = (biases, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps, seeds)
        if is_plain(x):
            weights = joined((*firsts, *others), layouts, x.dtype)
            ctx.implementation = _select(x, weights, lora_As, activation, seeds is not None)
            y, gate, up, s, s_down = _forward(ctx.implementation, x, weights, *arguments)
        else:
            ctx.implementation = None
            y, gate, up, s, s_down = torch.ops.peft_kernels.lora_swiglu_mlp(x, (*firsts, *others), layouts, *arguments)
        needs = GroupNeeds.from_flat(_wanted(ctx, others), 3, adapters)
        inner = [i for i in range(adapters) if outputs[i] < 2]
        keep_x = any(needs.lora_As[i] for i in inner) or any(needs.weights[:2])
        keep_s = any(needs.lora_Bs[i] for i in inner)
        keep_s_down = any(needs.lora_Bs[len(inner) :])
        ctx.save_for_backward(
            x if keep_x else None, gate, up, s if keep_s else None, s_down if keep_s_down else None, seeds,
            *firsts, *lora_As, *lora_Bs, *others,
        )  # fmt: skip
        ctx.scalings, ctx.outputs, ctx.activation, ctx.dropout_ps = scalings, outputs, activation, dropout_ps
        ctx.layouts = layouts
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("lora_swiglu_mlp", _gradients, ctx, grad_y, ctx.saved_tensors)


def _wanted(ctx, others) -> tuple[bool, ...]:
    """Whether a gradient is wanted of x, each weight, bias, A and B."""
    wanted = ctx.needs_input_grad
    return (wanted[0], *wanted[7 : len(wanted) - len(others)])


def _gradients(ctx, grad_y, saved):
    adapters = len(ctx.outputs)
    *activations, seeds = saved[:6]
    firsts, lora_As, lora_Bs, others = cut(saved[6:], 3, adapters, adapters)
    flat_needs = _wanted(ctx, others)
    arguments = (lora_As, lora_Bs, ctx.scalings, ctx.outputs, ctx.activation, ctx.dropout_ps, seeds)
    if ctx.implementation is not None and is_plain(grad_y):
        weights = joined((*firsts, *others), ctx.layouts, grad_y.dtype)
        needs = GroupNeeds.from_flat(flat_needs, 3, adapters)
        grads = _backward(ctx.implementation, grad_y, *activations, weights, *arguments, needs)
    else:
        backward = torch.ops.peft_kernels.lora_swiglu_mlp_backward
        wanted = iter(backward(grad_y, *activations, (*firsts, *others), ctx.layouts, *arguments, flat_needs))
        grads = [next(wanted) if need else None for need in flat_needs]
    return (grads[0], *([None] * 6), *grads[1:], *([None] * len(others)))


def _under_autocast(x, weights, biases, *others):
    """As in `lora_linear`: x, W and b take the autocast dtype, A and B stay as they are, and W of 4 bits too."""
    device = x.device.type
    x, *cast = autocast_together(x, *weights, *biases)
    with torch.autocast(device, enabled=False):
        return lora_swiglu_mlp(x, cast[:3], cast[3:], *others)


def lora_swiglu_mlp(x, weights, biases, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps, seeds):
    """The op with autograd, for arguments that `functional.lora_swiglu_mlp` has checked and flattened."""
    lora_Bs, scalings = fold_scalings(lora_Bs, scalings)
    numbers = (scalings, outputs, activation, dropout_ps)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return _under_autocast(x, weights, biases, lora_As, lora_Bs, *numbers, seeds)
    firsts, others, layouts = split(weights)
    if torch.is_grad_enabled():
        tensors = distinct((*firsts, *biases, *lora_As, *lora_Bs, *others))
        return LoraSwigluMlp.apply(x, seeds, *numbers, layouts, *tensors)
    return torch.ops.peft_kernels.lora_swiglu_mlp(
        x, [*firsts, *others], layouts, biases, lora_As, lora_Bs, *numbers, seeds
    )[0]
