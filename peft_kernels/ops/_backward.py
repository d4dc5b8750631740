"""What the backward of every op keeps to: it leaves autocast, and it refuses to be differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def first_gradients(op: str, gradients: Callable[..., tuple], ctx: Any, grad_y: Any, saved: Sequence) -> tuple:
    """`gradients(ctx, grad_y, saved)`, outside autocast and once differentiable.

    Args:
        op: the op's name, for the message of second derivatives.
        gradients: computes the gradients; None where nobody asked.
        ctx: the Function's context.
        grad_y: a tensor, or a sequence of tensors and None.
        saved: `ctx.saved_tensors`.
    """
    if torch._C._is_any_autocast_enabled():  # the forward's casts are done; here they would round float32 sums
        with torch.autocast(_device_type(grad_y), enabled=False):
            return _first(op, gradients, ctx, grad_y, saved)
    return _first(op, gradients, ctx, grad_y, saved)


def _device_type(grad_y: Any) -> str:
    given = (grad_y,) if isinstance(grad_y, Tensor) else [grad for grad in grad_y if grad is not None]
    return given[0].device.type if given else "cpu"


def _first(op, gradients, ctx, grad_y, saved):
    if not torch.is_grad_enabled():
        return gradients(ctx, grad_y, saved)
    with torch.no_grad():
        grads = gradients(ctx, grad_y, saved)
    return _guarded(op, grads, (grad_y,) if isinstance(grad_y, Tensor) else grad_y, saved)


class _NotTwice(torch.autograd.Function):
    """Identity on the first `count` tensors. The others are what those depend on: they connect the graph to the
    parameters. `once_differentiable` connects grad_y only: with y.sum(), whose grad_y is constant, a gradient penalty
    would vanish from the parameters' gradients without a word."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.op}: tried to differentiate twice, which is not supported: what forward saved counts as constant. "
            "For gradient penalties compute the layer from PyTorch's own functions instead"
        )


def _guarded(op, grads, grad_ys, saved):
    """Under create_graph=True: gradients that refuse to be differentiated again."""
    present = [grad for grad in grads if isinstance(grad, Tensor)]
    used = [tensor for tensor in (*grad_ys, *saved) if tensor is not None]
    guarded = iter(_NotTwice.apply(op, len(present), *present, *used))
    return tuple(next(guarded) if isinstance(grad, Tensor) else None for grad in grads)
