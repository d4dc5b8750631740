"""The op `philox_dropout`: dropout whose mask is recomputed from (seed, element) instead of being stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels import dispatch

SCHEMAS = {"philox_dropout": "(Tensor x, float p, Tensor seed, int row_offset=0) -> Tensor"}


class Problem(NamedTuple):
    device: str
    dtype: torch.dtype
    m: int
    k: int


def problem(x: Tensor, p: float = 0.0, seed: object = None, row_offset: int = 0) -> Problem:
    k = x.shape[-1]
    return Problem(x.device.type, x.dtype, x.numel() // k if k else 0, k)


def new_seed(device: torch.device) -> Tensor:
    """A seed [1] (int64) from torch's generator of that device: follows `torch.manual_seed`, checkpointing's saved
    RNG state and CUDA-graph capture, and is never read by the host."""
    return new_seeds(device, 1)


def new_seeds(device: torch.device, count: int) -> Tensor:
    """As many seeds at once: [count] int64."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)


def kernel(x: Tensor, p: float, seed: Tensor, row_offset: int = 0) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(-1, x.shape[-1])
    out = dispatch.select("philox_dropout", problem(x)).forward(rows, p, seed, row_offset)
    return out if x.ndim == 2 else torch.ops.aten._unsafe_view(out, x.shape)


def fake(x: Tensor, p: float, seed: Tensor, row_offset: int = 0) -> Tensor:
    return x.new_empty(x.shape)


KERNELS = {"philox_dropout": (kernel, fake)}


class PhiloxDropout(torch.autograd.Function):
    """The gradient is the same op on the incoming gradient: the mask is linear and does not depend on x."""

    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p = p
        ctx.save_for_backward(seed)
        return torch.ops.peft_kernels.philox_dropout(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (seed,) = ctx.saved_tensors
        return torch.ops.peft_kernels.philox_dropout(grad_y, ctx.p, seed), None, None


def philox_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return PhiloxDropout.apply(x, p, seed)
    return torch.ops.peft_kernels.philox_dropout(x, p, seed)
