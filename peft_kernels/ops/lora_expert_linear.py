"""The op `lora_expert_linear`: a stack of LoRA linears, each on its own rows of x, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._rows import row_bucket
from peft_kernels.ops._tracing import fold_scaling
from peft_kernels.ops.lora_linear import autocast_together

SCHEMAS = {
    "lora_expert_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor offsets, float scaling,"
        " float dropout_p, Tensor? seed) -> (Tensor y, Tensor s)"
    ),
    # Gradients of (x, weight, bias, lora_A, lora_B): as many as `needs` asks for, in that order.
    "lora_expert_linear_backward": (
        "(Tensor grad_y, Tensor? x, Tensor? s, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor offsets,"
        " float scaling, float dropout_p, Tensor? seed, bool[5] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two."""

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


def problem(x, weight, lora_A, lora_B, offsets, *, dropout_p=0.0, training=True, **_) -> Problem:
    return _problem(x, weight, lora_A, training and dropout_p > 0)


def _problem(rows: Tensor, weight: Tensor, lora_A: Tensor, dropout: bool) -> Problem:
    device, (e, n, k) = rows.device, weight.shape
    r, dtype = lora_A.shape[1], rows.dtype
    return Problem(device.type, device.index, dtype, lora_A.dtype, row_bucket(rows), e, n, k, r, dropout)


def _select(rows, weight, lora_A, dropout):
    return dispatch.select("lora_expert_linear", _problem(rows, weight, lora_A, dropout))


def kernel(x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
    chosen = _select(x, weight, lora_A, seed is not None)
    return chosen.forward(x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed)


def fake(x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], lora_A.shape[1])


def backward_kernel(grad_y, x, s, weight, lora_A, lora_B, offsets, scaling, dropout_p, seed, needs):
    chosen = _select(grad_y, weight, lora_A, seed is not None)
    grads = chosen.backward(grad_y, x, s, weight, lora_A, lora_B, offsets, scaling, dropout_p, seed, needs)
    return [grad for grad in grads if grad is not None]


def backward_fake(grad_y, x, s, weight, lora_A, lora_B, offsets, scaling, dropout_p, seed, needs):
    e, n, k = weight.shape
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    shapes = ((grad_y.shape[0], k), weight.shape, (e, n), lora_A.shape, lora_B.shape)
    dtypes = (grad_y.dtype, weight.dtype, wide, lora_A.dtype, lora_B.dtype)
    wanted = zip(shapes, dtypes, needs, strict=True)
    return [grad_y.new_empty(shape, dtype=dtype) for shape, dtype, need in wanted if need]


KERNELS = {"lora_expert_linear": (kernel, fake), "lora_expert_linear_backward": (backward_kernel, backward_fake)}


class LoraExpertLinear(torch.autograd.Function):
    """Saves x, S and the seed, each only when some wanted gradient uses it."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
        y, s = torch.ops.peft_kernels.lora_expert_linear(
            x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed
        )
        _, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
        saved_x = x if need_a or need_weight else None
        ctx.save_for_backward(saved_x, s if need_b else None, weight, lora_A, lora_B, offsets, seed)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("lora_expert_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[:5]
    *tensors, seed = saved
    grads = iter(
        torch.ops.peft_kernels.lora_expert_linear_backward(grad_y, *tensors, ctx.scaling, ctx.dropout_p, seed, needs)
    )
    return (*[next(grads) if need else None for need in needs], None, None, None, None)


def lora_expert_linear(x, weight, bias, lora_A, lora_B, offsets, scaling, dropout_p, seed):
    """The op with autograd, for arguments that `functional.lora_expert_linear` has checked."""
    lora_B, scaling = fold_scaling(lora_B, scaling)
    others = (lora_A, lora_B, offsets, scaling, dropout_p, seed)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = autocast_together(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return lora_expert_linear(x, weight, bias, *others)
    if torch.is_grad_enabled():
        return LoraExpertLinear.apply(x, weight, bias, *others)
    return torch.ops.peft_kernels.lora_expert_linear(x, weight, bias, *others)[0]
