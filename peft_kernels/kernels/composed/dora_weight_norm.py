"""`dora_weight_norm` from products of rank r: one pass over W, or two where ‖W‖² is not known.

A weight of 4 bits is decoded in pieces, of which no more than 64 MiB are dense at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.composed._passes import cast, row_blocks
from peft_kernels.kernels.composed.nf4_linear import dense, pieces


def unsupported(problem) -> str | None:
    return None


def forward(weight, lora_A, lora_B, scaling, weight_norm_squared):
    wide = torch.promote_types(torch.float32, weight.dtype)
    a, b = cast(lora_A, wide), cast(lora_B, wide)
    # rowsum((W Aᵀ) ⊙ B) for both terms: (2 s W Aᵀ + s² B A Aᵀ) ⊙ B.
    products = torch.mm(b, torch.mm(a, a.t())).mul_(scaling * scaling)
    squares = products.new_empty(weight.shape[0]) if weight_norm_squared is None else weight_norm_squared
    for block, rows in _row_blocks(weight, wide):
        products[block].addmm_(rows, a.t(), alpha=2 * scaling)
        if weight_norm_squared is None:
            torch.linalg.vecdot(rows, rows, out=squares[block])
    return torch.linalg.vecdot(products, b).add_(squares).clamp_(min=0).sqrt_()


def _row_blocks(weight: Tensor | NF4Weight, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, those rows of W in `wide`)."""
    if isinstance(weight, NF4Weight):
        n, k = weight.shape
        for start, stop in pieces(n, k * (weight.dtype.itemsize + wide.itemsize)):
            yield slice(start, stop), cast(dense(weight.rows(start, stop)), wide)
    else:
        for block in row_blocks(*weight.shape):
            yield block, cast(weight[block], wide)
