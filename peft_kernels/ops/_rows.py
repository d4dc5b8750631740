"""Tensors of any number of dimensions as rows, which is all that implementations know."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(tensor: Tensor) -> Tensor:
    """[..., K] as [M, K], a view where the strides allow one."""
    if tensor.ndim == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.ndim == 1 else tensor.flatten(0, -2)


def unflatten(rows: Tensor, batch: torch.Size) -> Tensor:
    """[M, N] as [*batch, N], for a result that nothing else holds."""
    # An ordinary view would make autograd refuse in-place changes of the result.
    return torch.ops.aten._unsafe_view(rows, (*batch, rows.shape[-1]))


def row_bucket(tensor: Tensor) -> int:
    """The number of rows rounded up to a power of two, so that varying batch sizes do not ask dispatch again."""
    m = tensor.numel() // max(1, tensor.shape[-1])
    return 1 << (m - 1).bit_length() if m > 0 else 0


def owned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is part of a larger memory. (Inside a registered op `_base` does not tell.)"""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
