"""Specification of y = x Wᵀ + b with a compressed W, and of its gradients: W in full, rounded to x's dtype.

x [M, K], W [N, K]; dvalues [blocks, B, B] are the kept blocks of dYᵀ x, 0 where a block reaches over the edge of W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.sparse import BlockWeight


def unsupported(problem) -> str | None:
    return None


def forward(x, weight, bias):
    return F.linear(x, weight.dense(x.dtype), bias)


def backward(grad_y, x, weight, needs):
    """Gradients (dx, dvalues, dbias); None where `needs` says that nobody asked."""
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    return (
        grad_y @ weight.dense(grad_y.dtype) if needs[0] else None,
        _grad_values(grad_y.to(wide).t() @ x.to(wide), weight) if needs[1] else None,
        grad_y.sum(0, dtype=wide) if needs[2] else None,
    )


def _grad_values(whole: Tensor, weight: BlockWeight) -> Tensor:
    (r, c), block = weight.grid, weight.block
    n, k = whole.shape
    tiles = F.pad(whole, (0, c * block - k, 0, r * block - n)).view(r, block, c, block)
    rows, columns = weight.structure.block_rows.long(), weight.structure.columns.long()
    return tiles[rows, :, columns].to(weight.dtype)
