"""Passes over big tensors that the composed implementations share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows are processed in blocks so that temporaries (dropped-out x, its float32 copy) stay bounded.
SCRATCH_ELEMENTS = 1 << 24


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, SCRATCH_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def drop(rows: Tensor, p: float, seed: Tensor | None, first_row: int) -> Tensor:
    if seed is None:
        return rows
    return torch.ops.peft_kernels.philox_dropout(rows, p, seed, first_row)


def down(x: Tensor, a: Tensor, dropout_p: float, seed: Tensor | None, out: Tensor, first_row: int = 0) -> Tensor:
    """out = drop(x) aᵀ, with a bounded copy of the dropped x, whose rows are numbered from `first_row`."""
    for block in row_blocks(*x.shape):
        torch.mm(drop(x[block], dropout_p, seed, first_row + block.start), a.t(), out=out[block])
    return out


def add_dropped(
    grad_x: Tensor, grad_s: Tensor, a: Tensor, scaling: float, dropout_p: float, seed: Tensor, first_row: int = 0
) -> None:
    """grad_x += scaling · drop(grad_s a), with a bounded temporary."""
    for block in row_blocks(*grad_x.shape):
        update = drop(torch.mm(grad_s[block], a), dropout_p, seed, first_row + block.start)
        grad_x[block].add_(update, alpha=scaling)


def sum_over_rows(left, right, parameter, scaling=1.0, dropout_p=0.0, seed=None, first_row=0) -> Tensor:
    """scaling · leftᵀ · drop(right), the gradient of `parameter` [left columns, right columns]: accumulated in at least
    float32 and rounded once, to the parameter's dtype."""
    dtype = parameter.dtype
    if seed is None and left.dtype == dtype:
        # With beta = 0 the parameter lends its shape only; its values are not read.
        return torch.addmm(parameter, left.t(), right, beta=0, alpha=scaling)
    if seed is None and left.is_cuda and dtype == torch.float32:
        return torch.mm(left.t(), right, out_dtype=torch.float32).mul_(scaling)
    wide = torch.promote_types(torch.float32, left.dtype)
    total = torch.zeros(parameter.shape, dtype=wide, device=left.device)
    for block in row_blocks(*right.shape):
        rows = drop(right[block], dropout_p, seed, first_row + block.start)
        total.addmm_(left[block].to(wide).t(), rows.to(wide), alpha=scaling)
    return total.to(dtype)


def sum_rows(grad_y: Tensor) -> Tensor:
    """The gradient of a bias: a sum in at least float32, not yet rounded to the bias's dtype."""
    return grad_y.sum(0, dtype=torch.promote_types(torch.float32, grad_y.dtype))
