"""The op `gated_activation`: h = act(gate) ⊙ up, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._rows import row_bucket, rows, unflatten

SCHEMAS = {
    "gated_activation": "(Tensor gate, Tensor up, str activation) -> Tensor",
    "gated_activation_backward": "(Tensor grad_h, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` is rounded up to a power of two."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    m: int
    n: int
    activation: str


def problem(gate: Tensor, up: Tensor, activation: str = "silu") -> Problem:
    device = gate.device
    return Problem(device.type, device.index, gate.dtype, row_bucket(gate), gate.shape[-1], activation)


def select(gate: Tensor, activation: str):
    """The implementation for [..., I] tensors like `gate`."""
    key = (gate.shape, gate.dtype, gate.device, activation)
    return dispatch.select_memoised("gated_activation", key, problem, gate, gate, activation)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    flat = flat.contiguous()  # elementwise functions keep the strides of what they are given
    if like.ndim == 2:
        return flat
    return flat.squeeze(0) if like.ndim == 1 else unflatten(flat, like.shape[:-1])


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else rows(tensor)


def kernel(gate, up, activation):
    if gate.ndim == 0:
        return kernel(gate.reshape(1), up.reshape(1), activation).reshape(())
    return _shaped(select(gate, activation).forward(_flat(gate), _flat(up), activation), gate)


def backward_kernel(grad_h, gate, up, activation):
    if gate.ndim == 0:
        grads = backward_kernel(grad_h.reshape(1), gate.reshape(1), up.reshape(1), activation)
    else:
        grads = select(gate, activation).backward(_flat(grad_h), _flat(gate), _flat(up), activation)
    return tuple(_shaped(grad, gate) if gate.ndim else grad.reshape(()) for grad in grads)


def fake(gate, up, activation):
    return gate.new_empty(gate.shape)


def backward_fake(grad_h, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


KERNELS = {"gated_activation": (kernel, fake), "gated_activation_backward": (backward_kernel, backward_fake)}


class GatedActivation(torch.autograd.Function):
    """Saves its two inputs, which the layers before it keep anyway."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return torch.ops.peft_kernels.gated_activation(gate, up, activation)

    @staticmethod
    def backward(ctx, grad_h):
        return first_gradients("gated_activation", _gradients, ctx, grad_h, ctx.saved_tensors)


def _gradients(ctx, grad_h, saved):
    grads = torch.ops.peft_kernels.gated_activation_backward(grad_h, *saved, ctx.activation)
    return (*[grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)], None)


def gated_activation(gate, up, activation):
    if torch.is_grad_enabled():
        return GatedActivation.apply(gate, up, activation)
    return torch.ops.peft_kernels.gated_activation(gate, up, activation)
