"""Which weights of a matrix are kept, and their bits: what the layouts of unstructured pruned weights are made from."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.formats.mask import PackedMask, popcount

PIECE = 1 << 22
"""Weights that are laid out at a time."""


def bits_of(values: Tensor) -> Tensor:
    """The same memory as integers, which are moved about without a change to the bits of a NaN."""
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def row_counts(weight: Tensor, mask: PackedMask | None) -> Tensor:
    """Kept weights of each row, int64 [n]."""
    if mask is not None:
        return popcount(mask.words).sum(1)
    pieces = weight.split(max(1, PIECE // max(1, weight.shape[1])))
    return torch.cat([piece.count_nonzero(1) for piece in pieces]) if pieces else weight.new_zeros(0, dtype=torch.int64)


def kept_rows(weight: Tensor, mask: PackedMask | None, rows: Tensor) -> Tensor:
    """bool [len(rows), k]."""
    if mask is None:
        return weight[rows] != 0
    return PackedMask(mask.words[rows], torch.Size((len(rows), mask.shape[1]))).unpack()
