"""The op `lora_embedding`: y = W[ids] + s A[:, ids]ᵀ Bᵀ, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._tracing import fold_scaling

SCHEMAS = {
    "lora_embedding": "(Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor",
    # Gradients of (weight, lora_A, lora_B): as many as `needs` asks for, in that order. padding_idx = -1: none.
    "lora_embedding_backward": (
        "(Tensor grad_y, Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, int padding_idx,"
        " bool[3] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by."""

    device: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    v: int
    d: int
    r: int


def problem(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **_) -> Problem:
    v, d = weight.shape
    return Problem(weight.device.type, weight.dtype, lora_A.dtype, v, d, lora_A.shape[0])


def kernel(ids, weight, lora_A, lora_B, scaling):
    chosen = dispatch.select("lora_embedding", problem(ids, weight, lora_A, lora_B))
    y = chosen.forward(ids.reshape(-1), weight, lora_A, lora_B, scaling)
    return torch.ops.aten._unsafe_view(y, (*ids.shape, weight.shape[1]))


def fake(ids, weight, lora_A, lora_B, scaling):
    return weight.new_empty(*ids.shape, weight.shape[1])


def backward_kernel(grad_y, ids, weight, lora_A, lora_B, scaling, padding_idx, needs):
    chosen = dispatch.select("lora_embedding", problem(ids, weight, lora_A, lora_B))
    rows = grad_y.reshape(-1, grad_y.shape[-1])
    grads = chosen.backward(rows, ids.reshape(-1), weight, lora_A, lora_B, scaling, padding_idx, needs)
    return [grad for grad in grads if grad is not None]


def backward_fake(grad_y, ids, weight, lora_A, lora_B, scaling, padding_idx, needs):
    return [t.new_empty(t.shape) for t, need in zip((weight, lora_A, lora_B), needs, strict=True) if need]


KERNELS = {"lora_embedding": (kernel, fake), "lora_embedding_backward": (backward_kernel, backward_fake)}


class LoraEmbedding(torch.autograd.Function):
    """Saves the indices."""

    @staticmethod
    def forward(ctx, ids, weight, lora_A, lora_B, scaling, padding_idx):
        ctx.save_for_backward(ids, weight, lora_A, lora_B)
        ctx.scaling, ctx.padding_idx = scaling, padding_idx
        return torch.ops.peft_kernels.lora_embedding(ids, weight, lora_A, lora_B, scaling)

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("lora_embedding", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    needs = ctx.needs_input_grad[1:4]
    grads = iter(torch.ops.peft_kernels.lora_embedding_backward(grad_y, *saved, ctx.scaling, ctx.padding_idx, needs))
    return (None, *[next(grads) if need else None for need in needs], None, None)


def lora_embedding(ids, weight, lora_A, lora_B, scaling, padding_idx):
    """The op with autograd, for arguments that `functional.lora_embedding` has checked."""
    lora_B, scaling = fold_scaling(lora_B, scaling)
    if torch.is_grad_enabled():
        return LoraEmbedding.apply(ids, weight, lora_A, lora_B, scaling, padding_idx)
    return torch.ops.peft_kernels.lora_embedding(ids, weight, lora_A, lora_B, scaling)
