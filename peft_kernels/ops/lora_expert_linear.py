"""The op `lora_expert_linear`: a stack of LoRA linears, each on its own rows of x, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._rows import row_bucket
from peft_kernels.ops._tracing import fold_scaling
from peft_kernels.ops._weights import Weight, all_dense, joined, split
from peft_kernels.ops.lora_linear import autocast_together

SCHEMAS = {
    # weight and layout: a dense stack and nothing, or what `_weights.split` makes of one of 4 bits.
    "lora_expert_linear": (
        "(Tensor x, Tensor[] weight, int[] layout, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor offsets,"
        " float scaling, float dropout_p, Tensor? seed) -> (Tensor y, Tensor s)"
    ),
    # Gradients of (x, weight, bias, lora_A, lora_B): as many as `needs` asks for, in that order.
    "lora_expert_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor? s, Tensor[] weight, int[] layout, Tensor lora_A, Tensor lora_B,"
        " Tensor offsets, float scaling, float dropout_p, Tensor? seed, bool[5] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two; `nf4`: whether the weights are of 4 bits."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    m: int
    experts: int
    n: int
    k: int
    r: int
    dropout: bool
    nf4: bool = False


def problem(x, weight, lora_A, lora_B, offsets, *, dropout_p=0.0, training=True, **_) -> Problem:
    return _problem(x, weight, lora_A, training and dropout_p > 0)


def _problem(rows: Tensor, weight: Weight, lora_A: Tensor, dropout: bool) -> Problem:
    device, (e, n, k) = rows.device, weight.shape
    r, dtype, nf4 = lora_A.shape[1], rows.dtype, not all_dense((weight,))
    return Problem(device.type, device.index, dtype, lora_A.dtype, row_bucket(rows), e, n, k, r, dropout, nf4)


def _select(rows, weight, lora_A, dropout):
    return dispatch.select("lora_expert_linear", _problem(rows, weight, lora_A, dropout))


def _stack(weight, layout, dtype, lora_B) -> Weight:
    """The weights of all experts, [experts, out, in]: a layout tells rows and columns only."""
    (whole,) = joined(weight, layout, dtype)
    e, n, _ = lora_B.shape
    return whole._replace(shape=torch.Size((e, n, whole.shape[1]))) if isinstance(whole, NF4Weight) else whole


def kernel(x, weight, layout, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
    weight = _stack(weight, layout, x.dtype, lora_B)
    chosen = _select(x, weight, lora_A, seed is not None)
    return chosen.forward(x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed)


def fake(x, weight, layout, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
    return x.new_empty(x.shape[0], lora_B.shape[1]), x.new_empty(x.shape[0], lora_A.shape[1])


def backward_kernel(grad_y, x, s, weight, layout, lora_A, lora_B, offsets, scaling, dropout_p, seed, needs):
    weight = _stack(weight, layout, grad_y.dtype, lora_B)
    chosen = _select(grad_y, weight, lora_A, seed is not None)
    grads = chosen.backward(grad_y, x, s, weight, lora_A, lora_B, offsets, scaling, dropout_p, seed, needs)
    return [grad for grad in grads if grad is not None]


def backward_fake(grad_y, x, s, weight, layout, lora_A, lora_B, offsets, scaling, dropout_p, seed, needs):
    weight = _stack(weight, layout, grad_y.dtype, lora_B)
    e, n, k = weight.shape
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    shapes = ((grad_y.shape[0], k), weight.shape, (e, n), lora_A.shape, lora_B.shape)
    dtypes = (grad_y.dtype, weight.dtype, wide, lora_A.dtype, lora_B.dtype)
    wanted = zip(shapes, dtypes, needs, strict=True)
    return [grad_y.new_empty(shape, dtype=dtype) for shape, dtype, need in wanted if need]


KERNELS = {"lora_expert_linear": (kernel, fake), "lora_expert_linear_backward": (backward_kernel, backward_fake)}


class LoraExpertLinear(torch.autograd.Function):
    """Saves x, S and the seed, each only when some wanted gradient uses it. `weight` is the first tensor of a weight of
    4 bits, `others` are the rest."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed, layout, *others):
        y, s = torch.ops.peft_kernels.lora_expert_linear(
            x, (weight, *others), layout, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed
        )
        _, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
        saved_x = x if need_a or need_weight else None
        ctx.save_for_backward(saved_x, s if need_b else None, lora_A, lora_B, offsets, seed, weight, *others)
        ctx.scaling, ctx.dropout_p, ctx.layout = scaling, dropout_p, layout
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("lora_expert_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:5]
    x, s, lora_A, lora_B, offsets, seed, *weight = saved
    backward = torch.ops.peft_kernels.lora_expert_linear_backward
    grads = iter(
        backward(grad_y, x, s, weight, ctx.layout, lora_A, lora_B, offsets, ctx.scaling, ctx.dropout_p, seed, needs)
    )
    return (*[next(grads) if need else None for need in needs], *([None] * (4 + len(weight))))


def lora_expert_linear(x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
    """The op with autograd, for arguments that `functional.lora_expert_linear` has checked."""
    lora_B, scaling = fold_scaling(lora_B, scaling)
    others = (lora_A, lora_B, offsets, scaling, dropout_p, seed)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = autocast_together(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return lora_expert_linear(x, weight, bias, *others)
    (first,), rest, layout = split((weight,))
    if torch.is_grad_enabled():
        return LoraExpertLinear.apply(x, first, bias, *others, layout, *rest)
    return torch.ops.peft_kernels.lora_expert_linear(x, [first, *rest], layout, bias, *others)[0]
